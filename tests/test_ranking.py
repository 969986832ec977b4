"""The order of a plan's rows, and what they are compared with."""

import pytest

from paci_schedule.core.schedules.registry import schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.plan.job import DATA_PARALLEL, Row
from paci_schedule.plan.prices import drifted_share
from paci_schedule.plan.ranking import compared, lines, ranked

GIB = 2**30


def row(name, speed, **changes):
    shape = {
        "stages": 4,
        "replicas": 2,
        "micro_batch_size": 1,
        "accumulation": 8,
        "recompute": False,
        "memory": 9 * GIB,
    }
    return Row(schedule=name, tokens_per_second=speed, **shape | changes)


def names(rows):
    return [each.schedule for each in rows]


def test_within_one_percent_drift_counts_before_memory_and_memory_before_headroom():
    rows = [
        row("a", 1000, drifted=0.2),
        row("b", 995, drifted=0.1, memory=20 * GIB),
        row("c", 991, drifted=0.1, memory=10 * GIB),
        row("d", 991, drifted=0.1, memory=10 * GIB, headroom=GIB),
        row("e", 989, drifted=0.0),  # 1.1% slower than the fastest: the next group
        row("f", 0, refused="needs 90 GiB"),
    ]
    assert names(ranked(rows)) == ["d", "c", "b", "a", "e", "f"]


def test_rows_are_compared_with_the_best_of_the_others_in_any_shape():
    """The fastest 1F1B has another shape than PACI: 59 tokens a second, where 1F1B in PACI's shape makes 35."""
    rows = [
        row("paci", 65.6),
        row("1f1b", 35),
        row("1f1b", 59.2, stages=16),
        row("zb-h2", 66.3),
        row(DATA_PARALLEL, 20),
    ]
    paci = compared(rows)[0]
    assert paci.against_1f1b == pytest.approx(1.108, abs=5e-4)
    assert paci.against_zero_bubble == pytest.approx(0.989, abs=5e-4)
    alone = compared([row("paci", 5), row("1f1b", 0, refused="no")])
    assert (alone[0].against_1f1b, alone[0].against_zero_bubble) == (None, None)


def test_rows_alike_are_one_line_and_a_division_has_one_line_for_each_schedule():
    rows = [
        row("paci", 10),
        row("paci", 9, micro_batch_size=2),
        row("zb-h1", 7),
        row("zb-v", 7),
        row("1f1b", 7, memory=8 * GIB),
        row("1f1b", 6, stages=2),
        row("gpipe", 0, refused="no"),
    ]
    assert [names(alike) for alike in lines(rows)] == [["paci"], ["zb-h1", "zb-v"], ["1f1b"], ["1f1b"]]


@pytest.mark.parametrize(("stages", "accumulation"), [(4, 3), (4, 8), (16, 64)])
def test_the_share_of_paci_that_drifts_is_half_of_its_lead(stages, accumulation):
    """Stage s runs P - 1 - s ahead, so of each a forwards so many are stale: on average (P-1)/2a."""
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    assert drifted_share(schedule("paci"), spec) == pytest.approx((stages - 1) / (2 * accumulation))
    assert drifted_share(schedule("1f1b"), spec) == 0
    assert drifted_share(schedule("pipedream"), spec) == pytest.approx((stages - 1) / stages)

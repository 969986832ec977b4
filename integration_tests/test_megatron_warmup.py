"""The first updates under a flush, then PACI: equal to a single process, and to stock as long as it lasts."""

import dataclasses

import pytest

from integration_tests.megatron_checks import EXACT, STOCK, assert_as_reference, assert_equal
from testing.megatron_job import train_all
from testing.megatron_model import GptJob
from testing.ranks import run_ranks

pytestmark = STOCK


def warming(updates, **job):
    return GptJob(**{"calls": 6, **job, "paci": {**job.get("paci", {}), "flush_warmup_steps": updates}})


@EXACT
def test_a_flushed_warm_up_trains_as_the_reference():
    """Drift is counted as 0 while it lasts; tied gradients and norms of the flushed updates are of their own update."""
    assert_as_reference(
        [
            warming(2),
            warming(1, accumulation=1, clip_grad=0.2),
            warming(3, tied=True, clip_grad=0.2),
            warming(2, bf16=True, distributed_optimizer=True, clip_grad=0.2),
            warming(2, paci={"drain_interval": 3}),
            warming(9, calls=3),
        ]
    )


@EXACT
@pytest.mark.slow
def test_a_flushed_warm_up_of_three_stages_trains_as_the_reference():
    assert_as_reference([warming(2, stages=3, accumulation=1, tied=True), warming(3, stages=3, accumulation=4)])


def test_a_warm_up_is_the_stock_schedule_and_drift_begins_after_it():
    job = warming(3, accumulation=2, data_parallel=2, clip_grad=0.2)
    stock = dataclasses.replace(job, schedule="1f1b")
    ranks = run_ranks(train_all, 4, ([job, stock],))
    for warmed, flushed in ranks:
        assert warmed.losses[:3] == flushed.losses[:3]
        assert warmed.norms[:3] == flushed.norms[:3]
        assert warmed.norms[3:] != flushed.norms[3:]
        for call in range(3):
            assert_equal(warmed.gradients[call], flushed.gradients[call], f"call {call}, gradient of")
    first, last = ranks[0][0], ranks[-1][0]
    assert first.parked == [0, 0, 0, 1, 1, 1]
    assert first.stats["drift_histogram"] == {0: 3 * 2 + 4, 1: 2}
    assert last.stats["drift_histogram"] == {0: 6 * 2}


def test_a_resumed_run_has_the_rest_of_its_warm_up():
    """A run that is resumed at update 2 of 3 has one more flushed update, and one at update 4 has none."""
    job = warming(3, clip_grad=0.2, tied=True, accumulation=1, paci={"drain_interval": 2})
    jobs = [job, *(dataclasses.replace(job, resume_after=update) for update in (2, 4))]
    for straight, *resumed in run_ranks(train_all, 2, (jobs,)):
        for each in resumed:
            assert_equal(each.weights, straight.weights, "weight")
            assert each.norms == straight.norms

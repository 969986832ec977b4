"""Synthetic recordings, each with one thing wrong: it is named, with what it costs."""

import random
from pathlib import Path

import pytest

from paci_schedule import PipelineSpec, trace
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.execute import simulate
from paci_schedule.simulate.figures import time_per_micro_batch
from paci_schedule.simulate.timeline import Span
from paci_schedule.trace.file import Recording
from paci_schedule.trace.replay import Replay
from paci_schedule.trace.verdicts import ideal_seconds, recorded_costs, seconds_per_micro_batch, stage_seconds, verdicts

STAGES, ACCUMULATION, BATCHES = 4, 4, 10
COUNT = ACCUMULATION * BATCHES


def recordings(data=0.0, skew=0.0, **costs):
    """A run of PACI on four stages; `data` seconds of every micro-batch's F on the first stage are a data read."""
    spec = PipelineSpec(stages=STAGES, accumulation=ACCUMULATION)
    timeline = simulate(schedule("paci"), spec, Costs(**{"forward": 1.0, "backward": 2.0} | costs), BATCHES)
    found = []
    for stage, row in enumerate(timeline.rows):
        spans, read, free = [], [], row[0].start
        for span in row:
            wait = {OpKind.FORWARD: OpKind.RECV_ACTIVATION, OpKind.BACKWARD: OpKind.RECV_GRADIENT}.get(span.op.kind)
            if wait and span.start > free:
                spans.append(Span(Op(wait, span.op.index), free, span.start))
            begin = span.start
            if data and stage == 0 and span.op.kind is OpKind.FORWARD:
                read.append((begin, begin + data))
                begin += data
            spans.append(Span(span.op, begin, span.end))
            free = span.end
        found.append(Recording(stage, STAGES, ACCUMULATION, spans, read).shifted(skew * stage))
    return trace.merge(found), timeline


def test_an_even_run_is_not_blamed():
    """40 micro-batches of 3 s, and 3 stages to fill and to drain."""
    run, timeline = recordings()
    assert timeline.makespan == 3 * (COUNT + STAGES - 1)
    assert verdicts(run) == []
    assert ideal_seconds(run) == 3 * COUNT
    assert seconds_per_micro_batch(run) == pytest.approx(3)
    assert stage_seconds(run) == [3] * STAGES


def test_a_straggler_is_named():
    """Stage 2 takes 1.25 times as long, and so does every round: without it the run would take a fifth less."""
    run, timeline = recordings(forward=[1, 1, 1.25, 1], backward=[2, 2, 2.5, 2])
    (verdict,) = verdicts(run)
    assert (verdict.cause, verdict.where) == ("stage", 2)
    assert str(verdict).startswith("stage 2 is 25% slower than the others: costs")
    even = 3 * (COUNT + STAGES - 1)
    assert verdict.cost == pytest.approx(1 - even / timeline.makespan, abs=0.002)
    assert verdict.cost == pytest.approx(0.2, abs=0.02)  # of an endless run


@pytest.mark.parametrize("skew", [0.0, 0.4])
def test_a_slow_link_is_named_even_where_clocks_differ(skew):
    """0.6 s each way on link 1-2: two rounds of 3 s take 1.2 s more, 3.6 s each."""
    run, timeline = recordings(latency=[0, 0.6, 0], skew=skew)
    (verdict,) = verdicts(run)
    assert (verdict.cause, verdict.where) == ("link", 1)
    assert str(verdict).startswith("link 1-2: 600 ms a message: costs")
    assert seconds_per_micro_batch(run) == pytest.approx(3.6, abs=0.02)
    even = 3 * (COUNT + STAGES - 1)
    assert verdict.cost == pytest.approx(1 - even / timeline.makespan, abs=0.01)


def test_jitter_is_named():
    run, timeline = recordings(jitter=0.3, seed=3)
    said = verdicts(run)
    assert said[0].cause == "jitter"
    assert said[0].finding.startswith("jitter: ops take ")
    assert all(verdict.cost < said[0].cost for verdict in said[1:])
    assert said[0].cost == pytest.approx(1 - 3 * (COUNT + STAGES - 1) / timeline.makespan, abs=0.04)


def test_slow_data_is_named():
    """The first stage reads for 1 s before each F: it takes 4 s a micro-batch where the others take 3."""
    run, timeline = recordings(data=1.0, forward=[2, 1, 1, 1])
    (verdict,) = verdicts(run)
    assert (verdict.cause, verdict.finding) == ("data", "data: stage 0 reads for 40 s")
    assert seconds_per_micro_batch(run) == pytest.approx((36 * 4 + 3 * 3) / 39)  # the last three were read ahead
    assert verdict.cost == pytest.approx(1 - 3 * (COUNT + STAGES - 1) / timeline.makespan, abs=1e-6)


def test_of_two_causes_that_delay_the_same_rounds_both_are_named():
    """Two rounds of the last two stages take 3 + 4.5 + 2 * 1.5 s, 5.25 each; without either of the two causes 4.5."""
    run, _ = recordings(forward=[1, 1, 1, 1.5], backward=[2, 2, 2, 3], latency=[0, 0, 1.5])
    found = {(verdict.cause, verdict.where): verdict.cost for verdict in verdicts(run)}
    assert found.keys() == {("stage", 3), ("link", 2)}
    assert list(found.values()) == pytest.approx([1 - 4.5 / 5.25] * 2, abs=0.02)


def test_a_part_of_a_run_is_judged_as_well():
    """A rank keeps its newest records only, and each begins elsewhere."""
    run, _ = recordings(forward=[1, 1, 1.25, 1], backward=[2, 2, 2.5, 2])
    draw = random.Random(5)
    cut = [
        Recording(one.stage, one.stages, one.accumulation, one.spans[draw.randint(20, 30) :], one.data) for one in run
    ]
    assert [(verdict.cause, verdict.where) for verdict in verdicts(cut)] == [("stage", 2)]


@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_costs_of_a_run_simulate_it(jitter):
    """Unequal stages, a slow link and updates: the simulator makes of their costs what was recorded, within 3%."""
    costs = {"forward": [2, 3, 2, 1], "backward": [5, 4, 4, 5], "latency": [0, 1, 0.5], "step": 0.7}
    run, _ = recordings(**costs, jitter=jitter)
    found = recorded_costs(run)
    assert found.jitter == pytest.approx(jitter, abs=0.02)
    if not jitter:
        assert found.forward == pytest.approx([2, 3, 2, 1])
        assert found.backward == pytest.approx([5, 4, 4, 5])
        assert found.step == pytest.approx([0.7] * STAGES)
        assert found.latency[1] == pytest.approx(1)
    spec = PipelineSpec(stages=STAGES, accumulation=ACCUMULATION)
    again = time_per_micro_batch(schedule("paci"), spec, found)
    assert again == pytest.approx(seconds_per_micro_batch(run), rel=0.03)


def test_a_message_that_was_held_back_is_replayed_so():
    """F and B take 1 s.  The gradient of micro-batch 1 leaves half a second after its backward, as at a call's end."""

    def spans(*rows):
        return [Span(Op.parse(op), start, end) for op, start, end in rows]

    first = spans(("F0", 0, 1), ("SA0", 1, 1), ("F1", 1, 2), ("SA1", 2, 2), ("B0", 3, 4), ("B1", 5.5, 6.5))
    last = spans(("F0", 1, 2), ("B0", 2, 3), ("SG0", 3, 3), ("F1", 3, 4), ("B1", 4, 5), ("SG1", 5.5, 5.5))
    replay = Replay([Recording(0, 2, 2, first, []), Recording(1, 2, 2, last, [])])
    assert replay.links == [0]
    assert replay.held == [pytest.approx((0 + 0 + 0 + 0.5) / 4)]  # of two activations and two gradients
    assert replay.seconds() == pytest.approx(6.5)


def test_costs_of_a_run_of_real_layers_simulate_it():
    """Within 3%; the replay, which knows each op's own time, too."""
    folder = Path(__file__).resolve().parents[1] / "docs" / "recording"
    run = trace.merge([trace.read(path) for path in sorted(folder.glob("*.jsonl"))])
    spec = PipelineSpec(stages=2, accumulation=4)
    again = time_per_micro_batch(schedule("paci"), spec, recorded_costs(run))
    assert again == pytest.approx(seconds_per_micro_batch(run), rel=0.03)
    assert Replay(run).seconds() == pytest.approx(trace.timeline(run).makespan, rel=0.015)

"""Transfers that begin when the receive is posted too: what posting late costs, and that it costs nothing else."""

import pytest

from paci_schedule import ConfigError, PipelineSpec
from paci_schedule.core.schedules.paci import Paci
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.execute import simulate
from paci_schedule.simulate.transfers import simulate_transfers


def period(spec, costs, early):
    """Time per micro-batch of the first stage, of the last of many batches."""
    timeline = simulate_transfers(Paci(), spec, costs, 40, early_receives=early)
    ends = [timeline.rows[0][done - 1].end for done in timeline.calls[0]]
    return (ends[38] - ends[18]) / (20 * spec.accumulation)


@pytest.mark.parametrize(("early", "slack", "expected"), [(False, 0, 10), (True, 0, 9), (False, 1, 9), (True, 1, 9)])
def test_a_stage_slower_than_the_next_pays_the_latency_of_a_late_posting(early, slack, expected):
    """Stage 1 is done with its 2 + 3 while stage 0 runs its F of 6: the gradient waits for the posting behind it."""
    spec = PipelineSpec(stages=2, accumulation=4, extra_in_flight=slack)
    assert period(spec, Costs(forward=[6, 2], backward=[3, 3], latency=1), early) == pytest.approx(expected)


def test_a_stage_as_fast_as_the_next_posts_in_time():
    """F of stage 0 and B of stage 1 end at the same time."""
    spec = PipelineSpec(stages=2, accumulation=4)
    late, early = (period(spec, Costs(forward=2, backward=2, latency=1), order) for order in (False, True))
    assert late == early == pytest.approx(5)


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_where_messages_take_no_time_the_order_of_postings_is_of_no_effect(stages, early, leading):
    spec = PipelineSpec(stages=stages, accumulation=3)
    costs = Costs(forward=[2, 5, 3, 2, 7][:stages], backward=[3, 4, 9, 5, 3][:stages], jitter=0.1)
    expected = simulate(Paci(leading), spec, costs, 6)
    found = simulate_transfers(Paci(leading), spec, costs, 6, early_receives=early)
    assert found.calls == expected.calls
    assert found.rows == expected.rows


@pytest.mark.parametrize("slack", [0, 2, (1, 0, 2)])
@pytest.mark.parametrize("leading", [False, True])
def test_posting_early_is_never_slower(slack, leading):
    spec = PipelineSpec(stages=4, accumulation=2, extra_in_flight=slack)
    costs = Costs(forward=[2, 5, 3, 2], backward=[3, 4, 9, 5], latency=[1, 4, 2], message_bytes=1, bandwidth=2)
    early, late = (
        simulate_transfers(Paci(leading), spec, costs, 6, early_receives=order).makespan for order in (True, False)
    )
    assert simulate(Paci(leading), spec, costs, 6).makespan <= early <= late


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-h2"])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_any_schedule_with_one_chunk_a_stage_runs(stages, early, name):
    """Where messages take no time and stages are alike, the order of postings has no effect; batches count on."""
    spec, costs = PipelineSpec(stages=stages, accumulation=6), Costs(forward=3, backward=4, weight=2, step=1)
    expected = simulate(schedule(name), spec, costs, 3)
    found = simulate_transfers(schedule(name), spec, costs, 3, early_receives=early)
    assert found.calls == expected.calls
    assert found.rows == expected.rows


def test_a_fast_stage_of_gpipe_waits_until_the_next_one_can_take_another_activation():
    """Stage 1 runs F0, has A1 and posts the receive of A2 only after F0; so A3 waits, and with it stage 0."""
    spec, costs = PipelineSpec(stages=2, accumulation=5), Costs(forward=[1, 5], backward=[1, 5])
    starts = [span.start for span in simulate_transfers(schedule("gpipe"), spec, costs).rows[0][:5]]
    assert [span.start for span in simulate(schedule("gpipe"), spec, costs).rows[0][:5]] == [0, 1, 2, 3, 4]
    assert starts == [0, 1, 2, 3, 6]


@pytest.mark.parametrize("name", ["interleaved-1f1b", "zb-v"])
def test_a_schedule_with_several_chunks_is_refused(name):
    with pytest.raises(ConfigError, match=f"schedule={name}: its messages are known only for one chunk a stage"):
        simulate_transfers(schedule(name), PipelineSpec(stages=2, accumulation=4), Costs(forward=1, backward=1))


def test_a_synchronised_run_is_refused():
    with pytest.raises(ConfigError, match="sync=1"):
        simulate_transfers(Paci(), PipelineSpec(stages=2, accumulation=2), Costs(forward=1, backward=1, sync=1))

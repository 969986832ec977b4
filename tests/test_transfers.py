"""Transfers that begin when the receive is posted too: what posting late costs, and that it costs nothing else."""

import pytest

from paci_schedule import ConfigError, PipelineSpec
from paci_schedule.core.schedules.paci import Paci
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


def test_a_synchronised_run_is_refused():
    with pytest.raises(ConfigError, match="sync=1"):
        simulate_transfers(Paci(), PipelineSpec(stages=2, accumulation=2), Costs(forward=1, backward=1, sync=1))

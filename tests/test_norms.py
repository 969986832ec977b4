"""The norms that travel with messages: what taking one in costs the device."""

from collections import Counter
from datetime import timedelta

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.runtime.deferred.norms import CarriedNorms


class CountOps(TorchDispatchMode):
    """Counts the ops that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def ops_of_messages(stages, accumulation):
    """Ops for each of the messages that the middle stage takes in, far from the start: down, up."""
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    norms = CarriedNorms(spec, stages // 2, None, torch.device("cpu"), agrees=False, timeout=timedelta(seconds=1))
    counts = []
    for come in (norms.came_down, norms.came_up):
        with CountOps() as counter:
            come(10 * stages, torch.rand(stages))
        counts.append(sum(counter.counts.values()))
    return counts


@pytest.mark.parametrize("accumulation", [1, 5])
def test_a_message_costs_as_many_ops_in_a_pipeline_of_any_length(accumulation):
    assert ops_of_messages(4, accumulation) == ops_of_messages(64, accumulation)
    assert max(ops_of_messages(64, accumulation)) <= 6


@pytest.mark.parametrize("agrees", [False, True])
def test_what_was_told_is_summed_and_what_is_not_finite_counts_as_zero(agrees):
    """Three stages, an update for each micro-batch; this is the middle one, at its fifth update."""
    spec = PipelineSpec(stages=3, accumulation=1)
    norms = CarriedNorms(spec, 1, None, torch.device("cpu"), agrees=agrees, timeout=timedelta(seconds=1))
    down, up = [3.0, 5.0, float("nan"), 7.0, 11.0, 13.0], [17.0, 19.0, 23.0, float("inf"), 31.0]
    for update in range(4):
        norms.add_own(torch.tensor(100.0 + update))
        norms.close_update()
    for micro_batch in range(1, 7):
        if micro_batch >= 3:  # it speaks of stage 0 after micro_batch - 2 updates
            norms.came_down(micro_batch, torch.tensor([down[micro_batch - 3], -1.0, -1.0]))
        if micro_batch <= 4:
            norms.came_up(micro_batch, torch.tensor([-1.0, -1.0, up[micro_batch - 1]]))
    square = torch.tensor(104.0)
    norms.complete(square)
    if agrees:  # update 4 - J of all stages, J = 3: stage 0's second, stage 1's, stage 2's
        assert square == down[1] + 101.0 + up[1]
    else:  # the newest of the others: stage 0's fourth, stage 2's fourth, which is infinite
        assert square == 104.0 + down[3] + 0.0

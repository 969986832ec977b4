"""When the sums of a tied weight's gradients start: where the program posts them, whenever the part is handed in."""

from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.runtime.deferred.tied import TiedGradient


@pytest.fixture
def started():
    """What all-reduces were started with; each doubles its tensor, as of two equal copies."""
    seen = []

    def all_reduce(tensor, group, async_op):
        seen.append(tensor.item())
        tensor.mul_(2)
        return mock.Mock()

    with (
        mock.patch.object(dist, "all_reduce", all_reduce),
        mock.patch.object(dist, "get_process_group_ranks", return_value=[0, 1]),
    ):
        yield seen


def tied_gradient(delay):
    """Of a weight that the first and the last stage share, whose sums are applied so many updates later."""
    return TiedGradient(None, [0, delay], PipelineSpec(stages=delay + 1, accumulation=1), timedelta(1))


def hand_in(tied, value):
    """Returns what the update applies."""
    gradient = torch.tensor([float(value)])
    tied.exchange(gradient)
    return gradient.item()


def test_a_part_is_held_until_its_sum_is_posted(started):
    tied = tied_gradient(2)
    assert [hand_in(tied, 1), hand_in(tied, 2), started] == [0, 0, []]
    tied.post()
    assert started == [1]
    assert hand_in(tied, 3) == 2
    tied.post()
    tied.post()
    assert started == [1, 2, 3]


def test_a_sum_posted_before_its_part_starts_with_it(started):
    """The last call before an empty pipe posts the sum of the update that follows it."""
    tied = tied_gradient(1)
    tied.post()
    assert hand_in(tied, 1) == 0
    assert started == [1]
    assert [total.item() for total in tied.pending()] == [2]
    hand_in_next = hand_in(tied, 5)
    assert (hand_in_next, started) == (2, [1])


def test_asking_for_the_pending_sums_posts_what_is_held_and_only_once(started):
    tied = tied_gradient(1)
    hand_in(tied, 1)
    assert [total.item() for total in tied.pending()] == [2]
    tied.post()  # where the program has it
    assert (hand_in(tied, 3), started) == (2, [1])
    tied.post()
    assert started == [1, 3]


def test_a_weight_of_one_stage_has_its_sum_already_and_nothing_is_started(started):
    with mock.patch.object(dist, "get_process_group_ranks", return_value=[4]):
        tied = tied_gradient(0)
    assert (hand_in(tied, 3), started) == (3, [])
    gradient = torch.tensor([5.0])
    tied.exchange_now(gradient)
    assert (gradient.item(), started) == (5, [])

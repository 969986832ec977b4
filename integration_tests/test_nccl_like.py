"""The backend with NCCL's habits: what NCCL would do late, wrongly or never is seen at once, and named."""

import ctypes
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from testing import nccl_like
from testing.played_stream import RaceError, StuckError
from testing.ranks import run_ranks


@pytest.fixture(autouse=True)
def _backend(monkeypatch):
    monkeypatch.setenv("PACI_TEST_BACKEND", nccl_like.BACKEND)


def message(act):
    """Rank 0 sends ones, late; rank 1 posts the receive and does `act(buffer, work)`.  What that gave, or the race."""
    if dist.get_rank() == 0:
        time.sleep(0.3)
        dist.isend(torch.ones(4), 1)
        return nccl_like.synchronize()
    buffer = torch.zeros(4)
    work = dist.irecv(buffer, 0)
    try:
        return act(buffer, work)
    except RaceError as error:
        return str(error)
    finally:
        nccl_like.synchronize()


def read_at_once(buffer, work):
    return (buffer + 1).tolist()


def read_the_result_of_a_view(buffer, work):
    return buffer.view(2, 2)[1].sum().item()


def read_by_numpy(buffer, work):
    return buffer.numpy().tolist()


def read_long_after_it_has_come(buffer, work):
    time.sleep(1)
    return (buffer + 1).tolist()


def write_at_once(buffer, work):
    return buffer.zero_().tolist()


def backward_through_it(buffer, work):
    weight = torch.ones(4, requires_grad=True)
    (weight * 2).backward(buffer)
    return weight.grad.tolist()


@pytest.mark.parametrize(
    "act",
    [
        read_at_once,
        read_the_result_of_a_view,
        read_by_numpy,
        read_long_after_it_has_come,
        write_at_once,
        backward_through_it,
    ],
)
def test_a_touch_of_what_is_received_without_a_wait_is_a_race(act):
    _, said = run_ranks(message, 2, (act,))
    verb = "writes" if act is write_at_once else "reads"
    assert f"{verb} a buffer of receive from rank 0 of default_pg (2 ranks), " in said
    assert "which was never waited for" in said


def wait_and_read(buffer, work):
    """`wait()` comes back before the message is there; until then the buffer is poisoned, and the read blocks."""
    assert work.wait()
    assert not work.is_completed()
    assert ctypes.string_at(buffer.data_ptr(), 16) == b"\xff" * 16
    return (buffer + 1).tolist()


def wait_with_a_timeout(buffer, work):
    assert work.wait(timedelta(seconds=60))
    assert work.is_completed()
    return (buffer + 1).tolist()


def wait_for_the_device(buffer, work):
    nccl_like.synchronize()
    return (buffer + 1).tolist()


def make_views_and_wait(buffer, work):
    half = buffer[2:].view(2, 1)
    work.wait()
    return [2.0, 2.0, *(half + 1).flatten().tolist()]


def differentiate_and_wait(buffer, work):
    work.wait()
    return [1 + number for number in backward_through_it(buffer / 2, work)]


@pytest.mark.parametrize(
    "act", [wait_and_read, wait_with_a_timeout, wait_for_the_device, make_views_and_wait, differentiate_and_wait]
)
def test_who_waits_reads_what_was_sent(act):
    assert run_ranks(message, 2, (act,))[1] == [2.0] * 4


def time_out(buffer, work):
    with pytest.raises(dist.DistBackendError, match=r"receive from rank 0 .* timed out after 0.01 s"):
        work.wait(timedelta(seconds=0.01))


def test_a_wait_with_a_timeout_ends():
    run_ranks(message, 2, (time_out,))


def send_and_write(waits):
    if dist.get_rank() == 1:
        buffer = torch.zeros(3)
        dist.recv(buffer, 0)
        return buffer.tolist()
    buffer = torch.ones(3)
    work = dist.isend(buffer, 1)
    assert buffer.sum() == 3  # to read it is no race
    if waits:
        work.wait()
        buffer.zero_()
    else:
        with pytest.raises(RaceError, match=r"add_.* writes a buffer of send to rank 1 .* was never waited for"):
            buffer[1:].add_(1)


@pytest.mark.parametrize("waits", [True, False])
def test_a_write_to_what_is_being_sent_is_a_race_until_someone_waits(waits):
    assert run_ranks(send_and_write, 2, (waits,))[1] == [1.0] * 3


def collectives():
    """Each kind, and whether it returned something without and with asyncOp; its result where it did not."""
    rank, given = dist.get_rank(), []
    for start, read in [
        (lambda t, op: dist.group.WORLD.allreduce([t], op(c10d.AllreduceOptions())), lambda t: t),
        (lambda t, op: dist.group.WORLD.broadcast([t], op(c10d.BroadcastOptions())), lambda t: t),
        (lambda t, op: dist.group.WORLD._allgather_base(t, t[:1] + rank, op(c10d.AllgatherOptions())), lambda t: t),
        (
            lambda t, op: dist.group.WORLD.allgather([list(t.split(1))], [t[:1] + rank], op(c10d.AllgatherOptions())),
            lambda t: t,
        ),
        (
            lambda t, op: dist.group.WORLD._reduce_scatter_base(t[:1], t + rank, op(c10d.ReduceScatterOptions())),
            lambda t: t[:1],
        ),
    ]:
        works = []
        for asynchronous in (False, True):

            def options(opts, asynchronous=asynchronous):
                opts.asyncOp = asynchronous
                return opts

            tensor = torch.tensor([rank + 1.0, rank + 2.0])
            works.append(start(tensor, options))
            if asynchronous:
                if len(given) != 2 or rank:  # who broadcasts may read what it sends
                    with pytest.raises(RaceError):
                        read(tensor).sum()
                works[-1].wait()
                assert read(tensor).tolist() == given[-1][1]
            else:
                given.append(([], read(tensor).tolist()))
        given[-1] = [work is None for work in works], given[-1][1]
    dist.barrier()
    return given


def test_a_collective_returns_nothing_unless_it_is_asked_to():
    first, second = run_ranks(collectives, 2)
    assert first == [([True, False], result) for result in ([3, 5], [1, 2], [1, 3], [1, 3], [4])]
    assert second == [([True, False], result) for result in ([3, 5], [1, 2], [1, 3], [1, 3], [6])]


def many_messages():
    """Two communicators, twenty messages each, received in order; the last wait is for all of one communicator."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    if dist.get_rank() == 0:
        for number in range(20):
            for group in groups:
                dist.isend(torch.full((2,), float(number)), 1, group=group)
        return nccl_like.synchronize()
    buffers = [[torch.empty(2) for _ in range(20)] for _ in groups]
    works = [[dist.irecv(buffer, 0, group=group) for buffer in row] for row, group in zip(buffers, groups, strict=True)]
    works[0][-1].wait()
    with pytest.raises(RaceError):
        buffers[1][0].sum()
    works[1][-1].wait()
    return [[buffer[0].item() for buffer in row] for row in buffers]


def test_messages_of_one_communicator_come_in_order():
    assert run_ranks(many_messages, 2)[1] == [list(range(20))] * 2


def sum_beside_a_message(first):
    """Rank 0 sends a message once it has rank 1's part of a sum, which rank 1 adds before it waits, or behind."""
    links, sums = (dist.new_group([0, 1]) for _ in range(2))
    work = dist.irecv(torch.empty(1), 0, group=links) if dist.get_rank() == 1 else None
    if first == "wait" and work:
        work.wait()
    total = dist.all_reduce(torch.ones(1), group=sums, async_op=True)
    if work:
        return work.wait()
    deadline = time.monotonic() + (1 if first == "wait" else 60)
    while not total.is_completed() and time.monotonic() < deadline:
        time.sleep(0.01)
    came = total.is_completed()
    dist.isend(torch.ones(1), 1, group=links)
    nccl_like.synchronize()
    return came


@pytest.mark.parametrize("first", ["sum", "wait"])
def test_what_is_posted_behind_a_wait_begins_behind_it(first):
    """As on a GPU, where the host goes on and the stream does not."""
    came, _ = run_ranks(sum_beside_a_message, 2, (first,))
    assert came == (first == "sum")


def never_sent():
    if dist.get_rank() == 1:
        dist.irecv(torch.empty(1), 0)
        with pytest.raises(StuckError, match=r"not idle after 0.5 s: it still runs receive from rank 0"):
            nccl_like.synchronize(0.5)


def test_a_device_that_never_comes_to_rest_is_reported():
    run_ranks(never_sent, 2)

"""The harness itself: ranks that raise, die or hang are reported and leave nothing behind."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from testing.ranks import RankError, _shared_gpu, backend, gather_outcomes, on_gpus, run_ranks


def all_ranks_meet(offset):
    device = "cpu" if dist.get_backend() != "nccl" else f"cuda:{dist.get_rank()}"
    number = torch.tensor([dist.get_rank() + offset], device=device)
    dist.all_reduce(number)
    print("rank", dist.get_rank(), "has met the others")
    return dist.get_rank(), number.item(), os.environ["OMP_NUM_THREADS"], torch.get_num_threads(), os.environ.get("HUE")


def rank_one(what):
    """Rank 1 does as told; rank 0 waits for it."""
    if dist.get_rank() == 1:
        if what == "raise":
            raise LookupError("rank one lost its key")
        if what == "exit":
            os._exit(7)
        if what == "kill":
            os.kill(os.getpid(), 9)
        if what == "unpicklable":
            return lambda: None
        print("rank one hangs")
        time.sleep(600)
    if what != "unpicklable":
        dist.barrier()
    return os.getpid()


def test_every_rank_returns_its_value():
    values = run_ranks(all_ranks_meet, 3, (5,), env={"HUE": "green"})
    assert values == [(rank, 5 + 6 + 7, "1", 1, "green") for rank in range(3)]


def test_two_jobs_share_nothing():
    first, second = (run_ranks(os.getpid, 2) for _ in range(2))
    assert len({*first, *second, os.getpid()}) == 5


@pytest.mark.parametrize(
    ("what", "shown"),
    [
        ("raise", r"(?s)rank 1 of 2 failed.*Traceback.*rank_one.*LookupError: rank one lost its key"),
        ("exit", r"rank 1 of 2 failed.*\ndied without a word \(exit code 7\)"),
        ("kill", r"rank 1 of 2 failed.*\ndied without a word \(SIGKILL\)"),
        ("unpicklable", r"(?s)rank 1 of 2 failed.*pickle"),
    ],
)
def test_a_rank_that_fails_is_shown_and_the_others_are_not_waited_for(what, shown):
    started = time.monotonic()
    with pytest.raises(RankError, match=shown):
        run_ranks(rank_one, 2, (what,), timeout=300)
    assert time.monotonic() - started < 100


def test_a_rank_that_hangs_is_killed_at_the_deadline():
    with pytest.raises(RankError, match=r"(?s)still running at the deadline \(3 s"):
        run_ranks(rank_one, 2, ("hang",), timeout=3)


def test_outcomes_tell_who_did_what():
    waits, hangs = gather_outcomes(rank_one, 2, ("hang",), timeout=3)
    assert (waits.ended, hangs.ended) == ("killed", "killed")
    assert "rank one hangs" in hangs.output
    assert 3 <= hangs.seconds < 100
    returned, raised = gather_outcomes(rank_one, 2, ("unpicklable",), timeout=30)
    assert (returned.ended, raised.ended) == ("returned", "raised")


def test_no_process_survives():
    outcomes = gather_outcomes(rank_one, 2, ("raise",), timeout=4)
    assert outcomes[1].raised[:2] == ("LookupError", "Exception")
    pid = run_ranks(os.getpid, 1)[0]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("asked", "gpus", "used"),
    [(None, 0, "gloo"), (None, 8, "gloo"), ("gloo", 8, "gloo"), ("nccl", 1, "gloo"), ("nccl", 2, "nccl"),
     ("nccl_shared", 0, "gloo"), ("nccl_shared", 1, "nccl"), ("nccl_like", 8, "nccl_like")],
)  # fmt: skip
def test_gpus_are_used_only_where_they_are_asked_for_and_there_are_enough_of_them(monkeypatch, asked, gpus, used):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("PACI_TEST_BACKEND", raising=False)
    if asked:
        monkeypatch.setenv("PACI_TEST_BACKEND", asked)
    assert backend(2) == used
    assert on_gpus(2) == (used == "nccl")


def test_ranks_that_share_a_gpu_claim_hosts_of_their_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings = [_shared_gpu(rank) for rank in range(4)]
    assert len({each["NCCL_HOSTID"] for each in settings}) == 4
    assert [each["LOCAL_RANK"] for each in settings] == ["0", "1", "0", "1"]


def test_a_backend_that_there_is_not_is_named(monkeypatch):
    monkeypatch.setenv("PACI_TEST_BACKEND", "ncll")
    with pytest.raises(ValueError, match="PACI_TEST_BACKEND=ncll: must be gloo, nccl_like, nccl or nccl_shared"):
        run_ranks(os.getpid, 1)

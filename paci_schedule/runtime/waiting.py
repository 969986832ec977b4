"""Waiting for other ranks: not longer than the timeout, and with an error that says who waited for whom."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from paci_schedule.errors import LinkError, PaciError

__all__ = [
    "WATCHDOG_MARGIN",
    "begun",
    "impatient",
    "named",
    "no_answer",
    "patience_of",
    "shorten_timeout",
    "together",
    "waiting",
]

WATCHDOG_MARGIN = timedelta(seconds=60)
"""How much later than the timeout NCCL's watchdog ends a process.

The watchdog counts from when the host posted an operation, the lookout from when a message stood before all others: the
margin lets the lookout speak first, unless the host has run ahead of its device by more than that.
"""

# What gloo and NCCL write of another rank.  Whatever else fails while a collective may be under way, such as tensors
# that do not fit together, is an error of its own.
_TRANSPORT = re.compile(
    r"gloo/transport|gloo connect|nccl ?error|nccl (communicator|operation)|nccl watchdog|ncclRemoteError"
    r"|(operation|work|wait) (ran )?time(d| ?out)|pair closure|connection (closed|reset|refused)|communicator.* abort",
    re.IGNORECASE,
)


def begun(work: dist.Work | None) -> dist.Work:
    """What was begun asynchronously, to be waited for; torch gives None only to a rank outside of the group."""
    assert work is not None, "this rank is in the group"
    return work


@contextmanager
def waiting(stage: int, doing: str, peers: str, ranks: Iterable[int], timeout: timedelta) -> Iterator[None]:
    """Turn a transport's error into one that says who waited for what.

    Args:
        stage: this rank's.
        doing: what it did, up to a preposition: "waited (RG2) for the gradient of micro-batch 2 from".
        peers: the other side, "stage 1" or "the replicas of this stage".
        ranks: the ranks whose logs to look at; this rank is left out.
        timeout: how long they may take.

    Raises:
        LinkError: in place of the transport's error.
    """
    try:
        yield
    except RuntimeError as error:
        if (told := named(error, stage, doing, peers, ranks, timeout)) is error:
            raise
        raise told from error


def named(error: Exception, stage: int, doing: str, peers: str, ranks: Iterable[int], timeout: timedelta) -> Exception:
    """A LinkError that says who waited for what, if an error is a transport's; else the error itself.

    Args:
        error: that was raised.
        stage, doing, peers, ranks, timeout: as of `waiting`.
    """
    others, transports = [rank for rank in ranks if rank != dist.get_rank()], _transports(error)
    if not others or transports is None:
        return error
    return LinkError(f"{no_answer(stage, doing, peers, others, timeout)}  The transport says: {transports}", others)


def no_answer(stage: int, doing: str, peers: str, others: list[int], timeout: timedelta) -> str:
    """The error text about other ranks that this one has waited for in vain; the arguments are those of `waiting`."""
    named = f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
    return (
        f"stage {stage} (rank {dist.get_rank()}) {doing} {peers} ({named}) and got no answer within the timeout of "
        f"{timeout.total_seconds():g} s, or a process is gone: look at the log of {named} first; if nothing is "
        'wrong but slow, raise the timeout (DeepSpeed: "paci": {"timeout": seconds}; Megatron: --paci-timeout seconds; '
        "SchedulePaci: timeout=seconds)."
    )


def _transports(error: BaseException | None) -> BaseException | None:
    """The error of a transport that an error is, or that caused it; None for an error of another kind."""
    while error is not None and not isinstance(error, PaciError):  # which says already what is wrong
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or _TRANSPORT.search(str(error))):
            return error
        error = error.__cause__
    return None


def patience_of(backend: str, timeout: timedelta) -> timedelta:
    """The timeout that a group of such a backend gets, where other ranks may take `timeout` to answer."""
    return timeout + WATCHDOG_MARGIN if backend == "nccl" else timeout


def shorten_timeout(group: dist.ProcessGroup, timeout: timedelta) -> list[tuple[Any, timedelta]]:
    """Let no collective of the group wait longer than `patience_of` says, where its backend can be told.

    Returns:
        the backends that have been told, each with the timeout that it had.
    """
    told = []
    for device in group._device_types:
        backend = group._get_backend(device)
        options = getattr(backend, "options", None)
        if options is not None and (patience := patience_of(backend.name(), timeout)) < options._timeout:
            told.append((backend, options._timeout))
            backend._set_default_timeout(patience)
    return told


@contextmanager
def impatient(timeout: timedelta) -> Iterator[None]:
    """While it lasts, no collective of this process waits longer than the timeout, in whichever group it is.

    The groups have their own timeouts again afterwards: what else a training script does in them may take longer.
    """
    with ExitStack() as told:
        for group in list(_world.pg_map):
            for backend, before in shorten_timeout(group, timeout):
                told.callback(backend._set_default_timeout, before)
        yield


@contextmanager
def together(stage: int, doing: str, timeout: timedelta) -> Iterator[None]:
    """While a framework does something over all ranks of the job: as `waiting`, and no longer than the timeout.

    Args:
        stage, timeout: as of `waiting`.
        doing: "evaluated", "saved a checkpoint".
    """
    everybody = range(dist.get_world_size())
    with impatient(timeout), waiting(stage, f"{doing} together with", "the other ranks", everybody, timeout):
        yield

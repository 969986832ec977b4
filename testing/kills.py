"""Kills at random moments of a save, again and again on the same folder: what loads afterwards?

A seed decides which ranks die, at which of their file operations, and how soon after it, so that a kill also meets a
file half written.  The next job loads the newest checkpoint, says which update it is of, and is killed in its own save.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from testing import ranks

__all__ = ["Kill", "Round", "loaded", "rounds", "saving"]

_FILE_OPERATIONS = frozenset({"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir"})


@dataclass(frozen=True)
class Kill:
    """When ranks die.

    Attributes:
        ranks: those that die; none for a save that is let be.
        operation: the file operation of their save, counted from 1, at which they die.
        seconds: how long after it.
    """

    ranks: tuple[int, ...]
    operation: int
    seconds: float

    @classmethod
    def drawn(cls, seed: int, world_size: int, operations: int) -> Kill:
        """One of `world_size` ranks, or all of them; at one of so many operations."""
        draw = random.Random(seed)
        everyone = tuple(range(world_size))
        chosen = draw.choice([*((rank,) for rank in everyone), everyone])
        return cls(chosen, draw.randint(1, operations), draw.choice([0.0, 0.001, 0.004]))


@dataclass(frozen=True)
class Round:
    """What became of one save.

    Attributes:
        kill: of this round.
        found: the update of the checkpoint that was loaded before.
        saved: whether every rank's save returned.
        ends: how the ranks ended: "returned", "died", or the error that they raised.
    """

    kill: Kill
    found: int
    saved: bool
    ends: tuple[str, ...]


@contextmanager
def saving(kill: Kill) -> Iterator[None]:
    """This rank saves, and dies if it is to."""
    left, active = kill.operation, dist.get_rank() in kill.ranks

    def watch(event: str, _: Any) -> None:
        nonlocal left
        if active and event in _FILE_OPERATIONS:
            left -= 1
            if left == 0:
                if kill.seconds:
                    signal.setitimer(signal.ITIMER_REAL, kill.seconds)  # its signal ends a process at once, too
                else:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        yield
        print("saved", flush=True)
    finally:
        active = False
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def loaded(update: int) -> None:
    """This rank has loaded the checkpoint of this update; 0 for none."""
    print(f"loaded {update}.", flush=True)


def rounds(job: Callable[..., Any], world_size: int, arguments: tuple, kills: Iterator[Kill]) -> Iterator[Round]:
    """Run ``job(kill, *arguments)`` on ranks, for one kill after the other."""
    for kill in kills:
        outcomes = ranks.gather_outcomes(job, world_size, (kill, *arguments), timeout=120, grace=40)
        found = {
            int(update) for outcome in outcomes for update in re.findall(r"^loaded (\d+)\.$", outcome.output, re.M)
        }
        told = [outcome.output.count("loaded ") for outcome in outcomes]
        assert (len(found), told) == (1, [1] * world_size), [outcome.error or outcome.output for outcome in outcomes]
        ends = tuple(outcome.error if outcome.ended == "raised" else outcome.ended for outcome in outcomes)
        yield Round(kill, found.pop(), all("\nsaved\n" in outcome.output for outcome in outcomes), ends)

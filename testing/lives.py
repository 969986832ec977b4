"""A DeepSpeed job that is cut off again and again: each life goes on from the newest checkpoint of the lives before.

A life ends with a fault at one of its calls, or with the end of the script.  What every stage has come to after each
call is written down at once, so that what happened before a fault can be compared, too.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testing import deepspeed_job, jobs, resources
from testing.jobs import Job

__all__ = ["KINDS", "Fault", "live", "written"]

KINDS = ("kill", "stop", "raise")


@dataclass(frozen=True)
class Fault:
    """What happens to one rank.

    Attributes:
        kind: "kill" (the process is gone), "stop" (it stands still for ever) or "raise" (an error in the script).
        rank: of the job.
        at: where in the calls that the life has before it: 0 is the first, 1 the end.
        seconds: after the beginning of that call; an error comes right before it.
    """

    kind: str
    rank: int
    at: float
    seconds: float

    @classmethod
    def drawn(cls, draw: random.Random, world_size: int) -> Fault:
        seconds = draw.choice([0.0, 0.002, 0.01, 0.05])
        return cls(draw.choice(KINDS), draw.randrange(world_size), draw.random(), seconds)

    def strike(self) -> None:
        """Let it happen to this rank."""
        if self.kind == "raise":
            raise RuntimeError("a mistake in the script")
        if self.kind == "stop":
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
        # Without a handler the signal of the timer ends the process, whatever it does.
        signal.setitimer(signal.ITIMER_REAL, max(self.seconds, 1e-6))


def live(job: Job, fault: Fault | None, folder: str, moments: str) -> list[resources.Held]:
    """What a rank does in one life.

    Args:
        job: with the whole script.
        fault: that this life ends with; None for none.
        folder: of the checkpoints.
        moments: the file in which this rank writes down what it has come to, without its number.

    Returns:
        What it held after each call.
    """
    engine = deepspeed_job.build(job)
    script, loads = list(job.actions()), Path(folder, "latest").exists()
    done = pulled = 0
    if loads:
        path, state = engine.load_checkpoint(folder)
        assert path is not None
        done, pulled = state["done"], state["pulled"]
        for name in ("accumulate", "samples", "schedule"):  # settings are the script's, not the checkpoint's
            newest = [action for action in script[:done] if action.startswith(f"{name}=")]
            for action in newest[-1:]:
                deepspeed_job.act(engine, job, action, iter(()))
    print(f"went on from action {done}.", flush=True)
    feed = deepspeed_job.Feed(jobs.data(job.model, pulled, job.shapes))
    strikes = None if fault is None else done + int(fault.at * (len(script) - done))
    readings = []
    with open(f"{moments}-{engine.stage_id}", "ab") as file:
        for number, action in enumerate(script[done:], done):
            if fault is not None and number == strikes and engine.global_rank == fault.rank:
                fault.strike()
            if action == "save":
                state = {"done": number + 1, "pulled": pulled + feed.pulled}
                engine.save_checkpoint(folder, tag="common" if number % 3 else None, client_state=state)
                loss = float("nan")
            elif action == "load":
                path, _ = engine.load_checkpoint(folder)
                assert path is not None
                loss = float("nan")
            else:
                loss = deepspeed_job.act(engine, job, action, feed)
            pickle.dump((number, deepspeed_job.moment(engine, action, loss)), file)
            file.flush()
            readings.append(resources.held())
        if fault is not None and engine.global_rank == fault.rank:
            time.sleep(2 * fault.seconds)  # for one that comes after the last call
    return readings


def written(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of each action, and what a rank has come to after it; a last one that was cut off is left out."""
    with open(path, "rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except (EOFError, pickle.UnpicklingError):
                return

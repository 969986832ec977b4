"""A job that is cut off again and again: each life goes on from the newest checkpoint of the lives before.

A life ends with a fault at one of its calls, or with the end of the script.  What every stage has come to after each
call is written down at once, so that what happened before a fault can be compared, too.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from testing import deepspeed_job, jobs, resources, torch_job
from testing.jobs import Job
from testing.kept import Kept

__all__ = ["KINDS", "Fault", "Life", "live", "on_deepspeed", "on_torch", "written"]

KINDS = ("kill", "stop", "raise")


class Life(NamedTuple):
    """A job between its start and its end.

    Attributes:
        stage: of this rank.
        done: how many actions of the script the checkpoint has behind it.
        act: does an action, given its number; what the stage has come to.
    """

    stage: int
    done: int
    act: Callable[[int, str], dict[str, Any]]


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


def live(
    job: Job, fault: Fault | None, folder: str, moments: str, begin: Callable[[Job, str], Life]
) -> list[resources.Held]:
    """What a rank does in one life.

    Args:
        job: with the whole script.
        fault: that this life ends with; None for none.
        folder: of the checkpoints.
        moments: the file in which this rank writes down what it has come to, without the number of its stage.
        begin: `on_deepspeed` or `on_torch`.

    Returns:
        What it held after each call.
    """
    life = begin(job, folder)
    script, done = list(job.actions()), life.done
    print(f"went on from action {done}.", flush=True)
    strikes = None if fault is None else done + int(fault.at * (len(script) - done))
    readings = []
    with open(f"{moments}-{life.stage}", "ab") as file:
        for number, action in enumerate(script[done:], done):
            if fault is not None and number == strikes and dist.get_rank() == fault.rank:
                fault.strike()
            pickle.dump((number, life.act(number, action)), file)
            file.flush()
            readings.append(resources.held())
        if fault is not None and dist.get_rank() == fault.rank:
            time.sleep(2 * fault.seconds)  # for one that comes after the last call
    return readings


def on_deepspeed(job: Job, folder: str) -> Life:
    """The life of an engine of DeepSpeed."""
    engine = deepspeed_job.build(job)
    script, loads = list(job.actions()), Path(folder, "latest").exists()
    done = pulled = 0
    if loads:
        path, state = engine.load_checkpoint(folder)
        assert path is not None
        done, pulled = state["done"], state["pulled"]
        for action in _newest(script[:done], "accumulate", "samples", "schedule"):
            deepspeed_job.act(engine, job, action, iter(()))
    feed = deepspeed_job.Feed(jobs.data(job.model, pulled, job.shapes))

    def act(number: int, action: str) -> dict[str, Any]:
        loss = float("nan")
        if action == "save":
            state = {"done": number + 1, "pulled": pulled + feed.pulled}
            engine.save_checkpoint(folder, tag="common" if number % 3 else None, client_state=state)
        elif action == "load":
            path, _ = engine.load_checkpoint(folder)
            assert path is not None
        else:
            loss = deepspeed_job.act(engine, job, action, feed)
        return deepspeed_job.moment(engine, action, loss)

    return Life(engine.stage_id, done, act)


def on_torch(job: Job, folder: str) -> Life:
    """The life of a schedule of torch.distributed.pipelining, whose checkpoints are `Kept`."""
    schedule, weights = torch_job.build(job)
    stage, kept = dist.get_rank() % job.stages, Kept(folder, dist.get_rank(), job.stages)
    done, saved = kept.newest()
    saved = {"pulled": 0} if saved is None else saved
    if done:
        torch_job.act(schedule, job, stage, "load", iter(()), saved)
        for action in _newest(list(job.actions())[:done], "schedule"):
            torch_job.act(schedule, job, stage, action, iter(()), saved)
    before, feed = saved["pulled"], deepspeed_job.Feed(jobs.data(job.model, saved["pulled"]))

    def act(number: int, action: str) -> dict[str, Any]:
        torch_job.act(schedule, job, stage, action, feed, saved)
        if action == "save":
            saved["pulled"] = before + feed.pulled
            kept.save(number + 1, saved)
        return torch_job.moment(schedule, action, float("nan"), weights)

    return Life(stage, done, act)


def _newest(done: list[str], *names: str) -> Iterator[str]:
    """The newest action of each name: settings are the script's, not the checkpoint's."""
    for name in names:
        yield from [action for action in done if action.startswith(f"{name}=")][-1:]


def written(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of each action, and what a rank has come to after it; a last one that was cut off is left out."""
    with open(path, "rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except (EOFError, pickle.UnpicklingError):
                return

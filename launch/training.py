"""The training loop: updates, validation, checkpoints, progress and log, the same for every pipeline schedule."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import PipelineEngine
from tqdm import tqdm

from launch.batches import MicroBatches
from launch.errors import LaunchError
from launch.runlog import RunLog

__all__ = ["LoopOptions", "Training"]


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """When the loop does what.  Intervals are in updates; 0 means never."""

    updates: int
    """Length of the whole run."""

    log_every: int
    """At least 1."""

    validate_every: int
    """The end of the run is validated in any case."""

    validation_batches: int
    """At most; fewer when the held-out text is shorter."""

    save_every: int
    """The end of the run is saved as well, unless 0."""

    checkpoints: Path
    """Folder of the checkpoints."""

    seed: int
    """Of dropout."""


class Training:
    """One engine being trained.  Every rank makes one and calls the same methods in the same order.

    Args:
        engine: of `deepspeed.initialize`.
        batches: training data of this rank's replica.
        validation: held-out data of this rank's replica.
        options: when to do what.
        log: written by one rank of the last stage, the first to know a loss; silent on the others.
    """

    def __init__(
        self, engine: PipelineEngine, batches: MicroBatches, validation: MicroBatches, options: LoopOptions, log: RunLog
    ) -> None:
        self._engine = engine
        self._batches = batches
        self._validation = validation
        self._options = options
        self._log = log
        self._watch = _Stopwatch()
        self._stage = _StageFacts(engine)
        self._batch_tokens = engine.train_batch_size() * batches.sequence_length

    def resume(self) -> int:
        """Load the newest checkpoint.  Returns the update after which it was saved.

        Raises:
            LaunchError: there is none.
        """
        path, state = self._engine.load_checkpoint(str(self._options.checkpoints))
        if path is None:
            folder = str(self._options.checkpoints)
            raise LaunchError(f"resume: no checkpoint in {folder!r}; name the --output of a run with --save-every")
        self._watch.seconds = self._log.rewind(state["update"])
        return state["update"]

    def run(self, start: int = 0) -> None:
        """Train from update `start` to the end."""
        options = self._options
        data = self._batches.from_batch(start)
        losses: list[torch.Tensor] = []
        progress = tqdm(
            total=options.updates,
            initial=start,
            unit="update",
            disable=dist.get_rank() != 0,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        )
        dist.barrier()
        self._watch.start()
        logged = self._watch.read()
        for update in range(start + 1, options.updates + 1):
            # Dropout is a function of the update: a resumed run draws the masks that the first one would have drawn.
            torch.manual_seed((options.seed * 1_000_003 + update) * dist.get_world_size() + dist.get_rank())
            rate = self._engine.get_lr()[0]
            losses.append(self._engine.train_batch(data).detach())
            last = update == options.updates
            validating = last or _due(update, options.validate_every)
            saving = options.save_every > 0 and (last or _due(update, options.save_every))
            if validating or saving:
                self._drain()
            if last or _due(update, options.log_every):
                self._report(update, losses, rate, logged, progress)
                losses, logged = [], self._watch.read()
            if validating:
                self._validate(update, progress)
            if saving:
                self._save(update)
            progress.update()
        self._watch.pause()
        progress.close()
        self._finish()

    def _drain(self) -> None:
        """Empty the pipe, at the cost of training time: PACI pays for it what a flush costs the other schedule."""
        if hasattr(self._engine, "drain"):
            self._engine.drain()

    def _report(self, update: int, losses: list[torch.Tensor], rate: float, logged: float, progress: tqdm) -> None:
        # Reading the loss waits for the device: once in `log_every` updates, so that the clock is right there.
        loss = torch.stack(losses).nanmean().item()
        seconds = self._watch.read()
        speed = len(losses) * self._batch_tokens / (seconds - logged)
        self._stage.measure()
        self._log.write(
            "update",
            update=update,
            tokens=update * self._batch_tokens,
            seconds=round(seconds, 4),
            loss=loss,
            learning_rate=rate,
            tokens_per_second=round(speed, 1),
            **self._stage.all_stages(self._batches.sequence_length),
        )
        progress.set_postfix_str(f"{speed:,.0f} tokens/s, loss {loss:.3f}{self._stage.summary()}")

    def _validate(self, update: int, progress: tqdm) -> None:
        self._watch.pause()
        data = self._validation.from_batch(0)
        batches = min(self._options.validation_batches, self._validation.batches_per_epoch)
        loss = torch.stack([self._engine.eval_batch(data).detach() for _ in range(batches)]).mean().item()
        self._log.write(
            "validation",
            update=update,
            tokens=update * self._batch_tokens,
            seconds=round(self._watch.read(), 4),
            loss=loss,
            perplexity=math.exp(loss),
        )
        if not progress.disable:
            progress.write(f"update {update}: validation loss {loss:.4f}, perplexity {math.exp(loss):.2f}", sys.stderr)
        self._watch.start()

    def _save(self, update: int) -> None:
        self._watch.pause()
        folder = str(self._options.checkpoints)
        self._engine.save_checkpoint(folder, tag=f"update{update}", client_state={"update": update})
        self._watch.start()

    def _finish(self) -> None:
        facts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(facts, self._stage.totals())
        self._log.write("end", update=self._options.updates, seconds=round(self._watch.read(), 4), stages=facts)


class _StageFacts:
    """What this rank's stage can say of itself; drift and waiting only where the engine counts them."""

    def __init__(self, engine: PipelineEngine) -> None:
        self._engine = engine
        self._compute = self._wait = 0.0
        self._last: dict[str, Any] = {}

    def measure(self) -> None:
        """Take the engine's counters since the last call."""
        if hasattr(self._engine, "pipeline_stats"):
            self._last = self._engine.pipeline_stats()
            self._compute += self._last["compute_seconds"]
            self._wait += self._last["wait_seconds"]

    def all_stages(self, sequence_length: int) -> dict[str, list[dict[str, float]]]:
        """For the log: what every stage has told of its newest updates, where the engine counts that."""
        figures = self._engine.stage_figures() if hasattr(self._engine, "stage_figures") else []
        told = [
            {
                "stage": stage,
                "version": each["version"],
                "drift": each["drift"],
                "waiting_share": round(each["waiting_share"], 4),
                "tokens_per_second": round(each["samples_per_second"] * sequence_length, 1),
            }
            for stage, each in enumerate(figures)
            if each is not None
        ]
        return {"stages": told} if told else {}

    def summary(self) -> str:
        """For the progress line: the largest drift and the share of this stage's time spent waiting."""
        if not self._last:
            return ""
        busy, idle = self._last["compute_seconds"], self._last["wait_seconds"]
        return f", drift {self._last['max_drift']}, waiting {idle / max(busy + idle, 1e-9):.0%}"

    def totals(self) -> dict[str, Any]:
        """For the log's end, JSON values."""
        cuda = torch.cuda.is_available() and self._engine.device.type == "cuda"
        facts: dict[str, Any] = {
            "stage": self._engine.stage_id,
            "replica": self._engine.grid.get_data_parallel_id(),
            "peak_memory": torch.cuda.max_memory_allocated() if cuda else _peak_resident_bytes(),
        }
        if self._last:
            facts |= {name: self._last[name] for name in ("max_drift", "drift_bound", "peak_in_flight")}
            facts |= {"compute_seconds": round(self._compute, 3), "wait_seconds": round(self._wait, 3)}
        return facts


class _Stopwatch:
    """Counts training seconds; stands still during validation and saving."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    def pause(self) -> None:
        self.seconds, self._started = self.read(), None

    def read(self) -> float:
        return self.seconds + (time.perf_counter() - self._started if self._started is not None else 0.0)


def _due(update: int, every: int) -> bool:
    return every > 0 and update % every == 0


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

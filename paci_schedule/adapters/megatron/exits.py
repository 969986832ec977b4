"""Ends of a job that nobody planned: a signal (--exit-signal-handler), a time (--exit-duration-in-mins).

Megatron-LM asks every rank in every iteration whether to end, and all wait for all.  Here a rank that has reason to end
names an iteration that is far enough ahead for every rank to hear of it in time, in the job's key-value store; the
first rank to do so decides.  Each rank looks there before each iteration, and waits for no other rank.  At that
iteration the pipe is empty, the job saves its checkpoint, and ends.

How far ahead: let D = ceil((P - 1) / a) be the iterations that the first stage reads ahead.  In a pipeline no stage is
more than D + 1 iterations ahead of another, and of one stage no replica is more than one iteration ahead.  So when a
rank that has done i iterations writes, no other rank has done more than i + D + 2, and it must know of the end D
iterations before: the end is iteration i + 2 D + 4, one later than it has to be.
"""

from __future__ import annotations

import logging
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from paci_schedule.adapters.megatron.job import Job
from paci_schedule.core.spec import PipelineSpec

__all__ = ["UnplannedEnd"]

logger = logging.getLogger(__name__)

_KEY = "end_after"
_SIGNAL = "--exit-signal-handler"


class UnplannedEnd:
    """The end of a job for a signal or a time, decided while it runs.

    The job's own way to ask is put off: its signal handler answers when the decided iteration is done, and the limit of
    time is taken out of its arguments.

    Args:
        job: which is to end.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._args = job, (args := job.args)
        self._minutes: float | None = args.exit_duration_in_mins
        self._store = dist.PrefixStore(f"paci_schedule/{args.iteration}", _get_default_store())
        self._end: int | None = None
        self._is_signalled = False
        args.exit_duration_in_mins = None
        self._handler = job.signal_handler
        if self._handler is not None:
            self._handler.signals_received = self._signals_received

    def after(self, done: int, spec: PipelineSpec) -> int | None:
        """The iteration after which the job ends, once that is decided; asked before each iteration.

        Args:
            done: iterations that this rank has done.
            spec: the pipeline.
        """
        if self._end is None and (reason := self._reason()):
            ahead = -(-spec.look_ahead(0) // spec.accumulation)
            self._store.compare_set(_KEY, "", f"{done + 2 * ahead + 4} {reason}")
        if self._end is None and self._store.check([_KEY]):
            end, reason = self._store.get(_KEY).decode().split(" ", 1)
            self._end, self._is_signalled = int(end), reason == _SIGNAL
            if dist.get_rank() == 0:
                logger.warning("%s: this job ends after iteration %s, where the pipe is empty", reason, end)
        if self._end is None:
            return None
        end = max(self._end, done + 1)  # later where iterations in between are skipped, before which the pipe is empty
        if end == done + 1 and not self._is_signalled:
            self._args.exit_interval = end
        return end

    def _signals_received(self) -> list[bool]:
        """Stands in for the job's question to all ranks, at the end of an iteration."""
        return [self._end is not None and self._is_signalled and self._job.finished >= self._end]

    def _reason(self) -> str:
        """Why this rank has reason to end the job, or nothing."""
        if self._handler is not None and self._handler._signal_received:
            return _SIGNAL
        if self._minutes and (time.time() - self._job.started) / 60 > self._minutes:
            return f"--exit-duration-in-mins {self._minutes}"
        return ""

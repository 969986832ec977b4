"""Evaluation by torch's own schedule, in which no stage waits longer than the timeout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining.schedules import ScheduleGPipe
from torch.distributed.pipelining.stage import _PipelineStageBase

from paci_schedule.runtime.waiting import together

__all__ = ["Evaluation"]


class Evaluation:
    """Forwards only, of the micro-batches of one batch.

    On gloo a message may take as long as its group was told when the group was made.  The messages of an evaluation
    therefore have a group of their own there, made at the first one.

    Args:
        stage: that is evaluated.
        pipeline: the process group of all stages.
        timeout: how long the other stages may take.
        arguments: of `ScheduleGPipe`, after the stage.
    """

    def __init__(
        self, stage: _PipelineStageBase, pipeline: dist.ProcessGroup, timeout: timedelta, *arguments: Any
    ) -> None:
        self._stage, self._pipeline, self._timeout = stage, pipeline, timeout
        self._schedule = ScheduleGPipe(stage, *arguments)
        self._group: dist.ProcessGroup | None = None

    def eval(self, *args: Any, **kwargs: Any) -> Any:
        """As ``ScheduleGPipe.eval``.

        Raises:
            LinkError: another stage did not answer in time.
        """
        with together(self._stage.stage_index, "evaluated", self._timeout), self._timed_messages():
            return self._schedule.eval(*args, **kwargs)

    @contextmanager
    def _timed_messages(self) -> Iterator[None]:
        if torch.device(self._stage.device).type != "cpu":  # NCCL's groups take another timeout at any time
            yield
            return
        if self._group is None:
            ranks = dist.get_process_group_ranks(self._pipeline)
            made = dist.new_group(ranks, self._timeout, use_local_synchronization=True)
            assert isinstance(made, dist.ProcessGroup), "this rank is one of them"
            self._group = made
        before, self._stage.group = self._stage.group, self._group
        try:
            yield
        finally:
            self._stage.group = before

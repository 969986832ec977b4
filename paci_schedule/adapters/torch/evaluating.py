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
    therefore have a group of their own there.  All ranks of the job make these groups together.

    Args:
        stage: that is evaluated.
        pipelines: the ranks of every pipeline of the job, the same list on every rank.
        timeout: how long the other stages may take.
        arguments: of `ScheduleGPipe`, after the stage.
    """

    def __init__(
        self, stage: _PipelineStageBase, pipelines: list[list[int]], timeout: timedelta, *arguments: Any
    ) -> None:
        self._stage, self._timeout = stage, timeout
        self._schedule = ScheduleGPipe(stage, *arguments)
        self._group: dist.ProcessGroup | None = None
        if torch.device(stage.device).type == "cpu":  # NCCL's groups can be told at any time
            made, _ = dist.new_subgroups_by_enumeration(pipelines, timeout=timeout)
            assert isinstance(made, dist.ProcessGroup), "this rank has a stage"
            self._group = made

    def eval(self, *args: Any, **kwargs: Any) -> Any:
        """As ``ScheduleGPipe.eval``.

        Raises:
            LinkError: another stage did not answer in time.
        """
        with together(self._stage.stage_index, "evaluated", self._timeout), self._timed_messages():
            return self._schedule.eval(*args, **kwargs)

    @contextmanager
    def _timed_messages(self) -> Iterator[None]:
        stocks = self._stage.group
        if self._group is not None:
            self._stage.group = self._group
        try:
            yield
        finally:
            self._stage.group = stocks

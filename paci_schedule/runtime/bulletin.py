"""What every stage tells of its updates while it trains: to the others, through the job's store, and to a file.

Nobody waits for it.  A stage hands its figures to the store when the device has copied the loss that belongs to them,
and whoever reports asks the store for what is there; so the figures of a stage are those of an update not long ago.
Only the pipeline of rank 0 tells.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _process_group_name

from paci_schedule.runtime.host_copy import HostCopy
from paci_schedule.trace import Figures, append_figures

__all__ = ["Bulletin"]

logger = logging.getLogger(__name__)


class Bulletin:
    """The figures of all stages; every rank of the job constructs its own at the same time.

    Args:
        stage, stages: where this rank stands in its pipeline.
        tells: whether this rank is one of those that tell.
        folder: of the recording, for a file of the figures; None for none.
        loss: of the numbers that a micro-batch's loss consists of.
        record: called with a number of ops, writes as many of the newest to the recording.
    """

    SECONDS = 1.0
    """Between two lines of a stage, at least, and between two questions to the store."""

    RECORDED = 10.0, 2000
    """Seconds, at least, between two recordings of the newest ops in a run that goes on, and how many ops these are."""

    def __init__(
        self,
        stage: int,
        stages: int,
        *,
        tells: bool,
        folder: str | None = None,
        loss: Callable[[Sequence[float]], float] = lambda losses: losses[0],
        record: Callable[[int], None] | None = None,
    ) -> None:
        number = _process_group_name([], False)  # one that nothing else has, the same on every rank
        self._store = dist.PrefixStore(f"paci bulletin {number}", _get_default_store())
        self._stage, self._keys, self._tells = stage, [str(each) for each in range(stages)], tells
        self._folder, self._loss, self._record = folder, loss, record
        self._told: tuple[float, int, tuple[float, float]] | None = None  # when, micro-batches, seconds
        self._pending: tuple[Figures, HostCopy] | None = None
        self._drift, self._tokens = 0, 0.0
        self._known: list[Figures | None] = [None] * stages
        self._asked = self._recorded = 0.0

    def count_tokens(self, inputs: Sequence[Any]) -> None:
        """Count the tokens of a batch that has been read: a micro-batch's input, or the first of several, has them if
        it is a tensor of integers with the shape [samples, length]."""
        ids = [each[0] if isinstance(each, tuple | list) and each else each for each in inputs]
        counts = [
            each.numel() * (each.dim() == 2 and each.dtype in (torch.int32, torch.int64))
            for each in ids
            if isinstance(each, torch.Tensor)
        ]
        self._tokens = sum(counts) / max(1, len(counts))

    def note(
        self, version: int, micro_batches: int, drift: int, seconds: tuple[float, float], losses: torch.Tensor
    ) -> None:
        """An update has been given to the device.

        Args:
            version: updates done, this one included.
            micro_batches: backwards done.
            drift: the largest of the update's micro-batches.
            seconds: computed and waited since the stage began.
            losses: float32[n], the means over the update's micro-batches.
        """
        if not self._tells:
            return
        self.tell()
        now = time.perf_counter()
        self._drift = max(self._drift, drift)
        if self._told is None:
            self._told, self._drift = (now, micro_batches, seconds), 0
        elif self._pending is None and now - self._told[0] >= self.SECONDS:
            then, before, (compute, wait) = self._told
            figures = Figures(
                stage=self._stage,
                version=version,
                at=time.time(),
                seconds=now - then,
                micro_batches=micro_batches - before,
                compute=seconds[0] - compute,
                wait=seconds[1] - wait,
                drift=self._drift,
                tokens=self._tokens,
            )
            self._pending = figures, HostCopy(losses)
            self._told, self._drift = (now, micro_batches, seconds), 0

    def tell(self) -> None:
        """Tell what has been noted, if its loss has come to the host."""
        if self._pending is None or not self._pending[1].has_arrived():
            return
        (figures, losses), self._pending = self._pending, None
        figures = replace(figures, loss=self._loss(losses.numbers()))
        try:
            self._store.set(str(self._stage), figures.line())
            if self._folder is not None:
                append_figures(self._folder, figures)
            seconds, newest = self.RECORDED
            if self._record is not None and time.perf_counter() - self._recorded >= seconds:
                self._recorded = time.perf_counter()
                self._record(newest)
        except (OSError, RuntimeError) as error:  # figures stop no training
            self._tells = False
            logger.warning("stage %d: tells no figures of its updates any more: %s", self._stage, error)

    def read(self) -> list[Figures | None]:
        """The newest figures of every stage that this rank knows of; None for a stage that has told none.

        The store is asked once a second, at most.
        """
        now = time.perf_counter()
        if now - self._asked >= self.SECONDS:
            self._asked = now
            try:
                if all(self._known) or self._store.check(self._keys):
                    self._known = [Figures.parse(bytes(line).decode()) for line in self._store.multi_get(self._keys)]
            except RuntimeError as error:
                logger.warning("the figures of the stages cannot be read: %s", error)
        return self._known

"""Where a stage's time goes, op by op, without ever waiting for the device.

On CUDA a mark is an event on the current stream: between the marks around a wait for a message lies the time that the
compute stream stood still, however far the host has run ahead.  On CPU a mark is the host's clock.
"""

from __future__ import annotations

import time
from collections import Counter, deque

import torch

from paci_schedule.ops import Op, OpKind

__all__ = ["Timeline"]


class Timeline:
    """Laps of one stage: each op's span ends where the next one's begins.

    Args:
        device: where the stage computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._last: float | torch.cuda.Event = self._mark()
        self._open: deque[tuple[OpKind | None, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds: Counter[OpKind | None] = Counter()

    def start(self) -> None:
        """What came since the last lap was not the stage's own work (the caller had control)."""
        self._lap(None)

    def lap(self, op: Op) -> None:
        """`op` ends here."""
        self._lap(op.kind)

    def totals(self) -> Counter[OpKind | None]:
        """Seconds booked so far for each kind of op, None for the caller's time.

        On CUDA these are the ops that the device has finished.
        """
        self._fold()
        return self._seconds.copy()

    def _lap(self, kind: OpKind | None) -> None:
        mark = self._mark()
        if self._on_cuda:
            self._open.append((kind, self._last, mark))
            self._fold()
        else:
            self._seconds[kind] += mark - self._last
        self._last = mark

    def _fold(self) -> None:
        while self._open and self._open[0][2].query():
            kind, begin, end = self._open.popleft()
            self._seconds[kind] += begin.elapsed_time(end) / 1e3

    def _mark(self) -> float | torch.cuda.Event:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

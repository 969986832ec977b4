"""Where a stage's time goes, op by op, without ever waiting for the device.

On CUDA a mark is an event on the current stream: between the marks around a wait for a message lies the time that the
compute stream stood still, however far the host has run ahead.  On CPU a mark is the host's clock.

The time between two events is a float32, so a chain of them strays from the host's clock over hours.  Where the caller
comes back to a device that has done all it was given, as after a drain, an event is recorded the moment it is asked
for: there the chain begins anew at the host's clock.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator

import torch

from paci_schedule.core.ops import Op

__all__ = ["DATA", "Stopwatch"]

DATA = "data"
"""What reading from the data iterator is booked as."""

_KEPT = 1 << 16


class Stopwatch:
    """Laps of one stage: each span ends where the next one begins.

    Args:
        device: where the stage computes.
        records: keep the newest spans, one by one, for `spans`.
    """

    def __init__(self, device: torch.device, records: bool = False) -> None:
        self._last = _mark() if device.type == "cuda" else None
        if self._last is not None:
            self._last.synchronize()
        self._now = time.perf_counter()  # of the last mark that was folded
        # On CUDA: what, from where to where, and the host's clock at the end where the device was idle.
        self._open: deque[tuple[Op | str | None, torch.cuda.Event, torch.cuda.Event, float | None]] = deque()
        self._seconds: defaultdict[str | None, float] = defaultdict(float)
        self._spans: deque[tuple[Op | str, float, float]] | None = deque(maxlen=_KEPT) if records else None

    def start(self) -> None:
        """What came since the last lap was not the stage's own work (the caller had control)."""
        self._fold()
        idle = self._last is not None and not self._open and torch.cuda.current_stream().query()
        self._lap(None, idle)

    def lap(self, what: Op | str) -> None:
        """`what` ends here."""
        self._lap(what)

    def totals(self) -> defaultdict[str | None, float]:
        """Seconds booked so far: for each kind of op as it prints, for DATA, and for None, the caller's time.

        On CUDA these are the ops that the device has finished.
        """
        self._fold()
        return self._seconds.copy()

    def spans(self) -> Iterator[tuple[Op | str, float, float]]:
        """The recorded spans, oldest first: what, and its start and end in seconds of `time.perf_counter`."""
        self._fold()
        yield from self._spans or ()

    def newest(self, count: int) -> list[tuple[Op | str, float, float]]:
        """So many of the newest `spans`, as far as they are booked; a thread may ask that is not the stage's."""
        return [*(self._spans or deque()).copy()][-count:]

    def _lap(self, what: Op | str | None, idle: bool = False) -> None:
        if self._last is None:
            self._book(what, time.perf_counter())
            return
        mark = _mark()
        self._open.append((what, self._last, mark, time.perf_counter() if idle else None))
        self._last = mark
        self._fold()

    def _fold(self) -> None:
        while self._open and self._open[0][2].query():
            what, begin, end, at = self._open.popleft()
            self._book(what, self._now + begin.elapsed_time(end) / 1e3 if at is None else at)

    def _book(self, what: Op | str | None, end: float) -> None:
        start, self._now = self._now, end
        self._seconds[what.kind.value if isinstance(what, Op) else what] += end - start
        if self._spans is not None and what is not None:
            self._spans.append((what, start, end))


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event

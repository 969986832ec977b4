"""A report of the stage that a stage waits for, on a transport whose wait returns at once and whose watchdog is silent.

On NCCL `wait` makes the device's stream wait, not the host, so no LinkError can be raised there.  The lookout keeps the
messages that the stage waits for, in the stream's order.  The device is waiting for the oldest one that has not come.
Its age counts from when it became the oldest, so a host that runs far ahead of its device raises no alarm.  While the
host goes on, its own thread only appends twice to a deque and asks whether the oldest message has come.  The lookout's
thread asks the device only when the host has stood still for a while, so that it does not disturb the capture of a CUDA
graph.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from paci_schedule.errors import LinkError
from paci_schedule.runtime.waiting import no_answer

__all__ = ["Lookout"]

logger = logging.getLogger(__name__)

_NEWEST = 12
_QUIET = 10.0  # seconds


@dataclass(frozen=True, eq=False)
class _Wait:
    doing: str
    peer_stage: int
    peer: int
    work: dist.Work


class Lookout:
    """Reports once which message a stage has waited for longer than `timeout`.

    Args:
        stage: this rank's.
        device: where the messages live.
        timeout: how long a message may take.
        lost: told of the error, by the lookout's thread; None for nobody.
        interval: seconds between two looks.
    """

    def __init__(
        self,
        stage: int,
        device: torch.device,
        timeout: timedelta,
        lost: Callable[[LinkError], None] | None = None,
        interval: float = 1.0,
    ) -> None:
        self._stage, self._timeout, self._lost = stage, timeout, lost
        self._waits: deque[_Wait] = deque()
        self._newest: deque[str] = deque(maxlen=_NEWEST)
        self._lock = threading.Lock()
        self._quiet = min(_QUIET, timeout.total_seconds() / 10)
        self._moved = self._glanced = self._since = time.monotonic()
        self._oldest: _Wait | None = None
        self._reported = False
        looking = threading.Thread(
            target=_look, args=(weakref.ref(self), device, interval), name="paci lookout", daemon=True
        )
        looking.start()

    def note(self, op: object) -> None:
        """The host has come to this op."""
        self._newest.append(str(op))

    def expect(self, doing: str, peer_stage: int, peer: int, work: dist.Work) -> None:
        """The device's stream is about to wait for a message.

        Messages that have come are let go of here, by the host's own thread, for each one holds its buffer.

        Args:
            doing: as in `waiting`.
            peer_stage, peer: stage and global rank at the other end.
            work: of the message.
        """
        self._moved = time.monotonic()
        with self._lock:
            self._waits.append(_Wait(doing, peer_stage, peer, work))
            self._let_go()

    def _let_go(self) -> _Wait | None:
        """Forget the messages that have come.  Returns the oldest one that has not."""
        while self._waits and self._waits[0].work.is_completed():
            self._waits.popleft()
        return self._waits[0] if self._waits else None

    def _glance(self) -> None:
        """Look at the oldest message, unless the host goes on."""
        now = time.monotonic()
        if now - self._moved < self._quiet:
            return
        with self._lock:
            oldest = self._let_go()
        before, self._glanced = self._glanced, now
        if oldest is not self._oldest:
            self._oldest, self._since, self._reported = oldest, max(before, self._moved), False
        elif oldest is not None and not self._reported and now - self._since > self._timeout.total_seconds():
            self._reported = True
            self._report(oldest)

    def _report(self, wait: _Wait) -> None:
        error = no_answer(self._stage, wait.doing, f"stage {wait.peer_stage}", [wait.peer], self._timeout)
        line = f"{error}  The newest ops of this stage that send or receive: {', '.join(self._newest)}"
        logger.error(line)
        if self._lost is not None:
            self._lost(LinkError(line, [wait.peer]))


def _look(lookout: weakref.ref[Lookout], device: torch.device, interval: float) -> None:
    """The life of a lookout's thread: as long as the lookout's, or until the device fails."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread begins on the first GPU, where it would open a context of its own
    while (one := lookout()) is not None:
        try:
            one._glance()
        except RuntimeError:  # the device's error; the stage's own thread meets it too
            return
        del one
        time.sleep(interval)

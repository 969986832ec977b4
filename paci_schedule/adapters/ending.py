"""What becomes of the micro-batches in flight when a job ends: most scripts end without a `drain`."""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from paci_schedule.runtime.departure import Departure
from paci_schedule.runtime.stage import StageRunner

__all__ = ["Ending"]

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(seconds=60)
_INTERRUPTED = "an error interrupted the pipe"


class _Drainable(Protocol):
    """An engine, or a schedule, as its end needs it."""

    device: torch.device
    _runner: StageRunner

    def drain(self) -> object: ...

    def report(self, waits: bool) -> None: ...


class Ending:
    """The end of an engine: it drains where every rank comes to it without an error; else a warning says what is lost.

    An engine that neither `destroyed` nor `forgotten` has ended ends when its process exits.  Every rank constructs its
    own at the same time.

    Args:
        engine: held by a weak reference, but for the time in which it has micro-batches in flight (`keep`).
        warns: whether this rank is the one that warns.
        timeout: how long another rank may take to answer; at the exit of the process a minute at most.
        remedy: what a script calls that applies its last update.
    """

    def __init__(self, engine: _Drainable, warns: bool, timeout: timedelta, remedy: str) -> None:
        self._engine, self._warns, self._remedy = weakref.ref(engine), warns, remedy
        self._patience = min(timeout, _PATIENCE)
        self._departure = Departure()
        self._ended = False
        self._kept: _Drainable | None = None
        atexit.register(self._exited)

    def keep(self, engine: _Drainable) -> None:
        """Hold the engine while it has micro-batches in flight that can be finished, also if the script drops it."""
        runner = engine._runner
        self._kept = engine if runner.admitted and not (runner.interrupted or self._ended) else None

    def destroyed(self, engine: _Drainable) -> None:
        """Every rank destroys its engine."""
        self._end(engine, self._told(engine, _trouble(engine, sys.exc_info()[1])))

    def forgotten(self, engine: _Drainable) -> None:
        """Nothing refers to the engine any more, so nothing is in flight, or an error keeps it from being finished."""
        self._end(engine, self._told(engine, _INTERRUPTED))

    def _exited(self) -> None:
        engine = self._engine()
        if engine is None or not (engine._runner.admitted or engine._runner.interrupted):
            return
        trouble = _trouble(engine, getattr(sys, "last_value", None))
        self._end(engine, self._departure.trouble(trouble, self._patience))

    def _told(self, engine: _Drainable, trouble: str | None) -> str | None:
        """This rank's trouble; the ranks that come to the exit of their process hear of it, and do not wait."""
        if trouble is not None and engine._runner.admitted and not self._ended:
            self._departure.trouble(trouble, self._patience)
        return trouble

    def _end(self, engine: _Drainable, trouble: str | None) -> None:
        if self._ended:
            return
        self._ended, self._kept = True, None
        atexit.unregister(self._exited)
        if trouble is None:
            engine.drain()
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)  # the others may still read what this stage has sent
            return
        engine.report(waits=False)  # the device may never come to what was to be printed
        if self._warns and engine._runner.admitted:
            logger.warning(
                "training ended with micro-batches in flight, whose update is lost: %s; to apply it, call %s on every "
                "rank when training ends",
                trouble,
                self._remedy,
            )


def _trouble(engine: _Drainable, error: BaseException | None) -> str | None:
    """What keeps this rank from draining; None for nothing."""
    if isinstance(error, SystemExit):
        return f"the script ended with exit code {error.code}"
    if error is not None:
        return "an exception was on its way"
    if engine._runner.interrupted:
        return _INTERRUPTED
    return None if dist.is_initialized() else "the script destroyed the process group first"

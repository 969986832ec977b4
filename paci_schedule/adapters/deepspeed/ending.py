"""What becomes of the micro-batches in flight when an engine ends: most scripts end without `destroy`."""

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


class _Drainable(Protocol):
    """An engine, as its end needs it."""

    device: torch.device
    _runner: StageRunner

    def drain(self) -> object: ...


class Ending:
    """The end of an engine: it drains where every rank comes to it without an error; else a warning says what is lost.

    An engine that neither `destroyed` nor `forgotten` has ended ends when its process exits.  Every rank constructs its
    own at the same time.

    Args:
        engine: held by a weak reference only.
        warns: whether this rank is the one that warns.
        timeout: how long another rank may take to answer; at the exit of the process a minute at most.
    """

    def __init__(self, engine: _Drainable, warns: bool, timeout: timedelta) -> None:
        self._engine, self._warns = weakref.ref(engine), warns
        self._patience = min(timeout, _PATIENCE)
        self._departure = Departure()
        self._ended = False
        atexit.register(self._exited)

    def destroyed(self, engine: _Drainable) -> None:
        """Every rank destroys its engine."""
        self._end(engine, self._told(engine, _trouble(engine, sys.exc_info()[1])))

    def forgotten(self, engine: _Drainable) -> None:
        """Nothing refers to the engine any more: it does not wait for its neighbours, which may still have theirs."""
        self._end(engine, self._told(engine, "nothing referred to the engine any more"))

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
        self._ended = True
        atexit.unregister(self._exited)
        if trouble is None:
            engine.drain()
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)  # the others may still read what this stage has sent
        elif self._warns and engine._runner.admitted:
            logger.warning(
                "training ended with micro-batches in flight, whose update is lost: %s; to apply it, call "
                "engine.drain() or engine.destroy() on every rank when training ends",
                trouble,
            )


def _trouble(engine: _Drainable, error: BaseException | None) -> str | None:
    """What keeps this rank from draining; None for nothing."""
    if error is not None:
        return "an exception was on its way"
    if engine._runner.interrupted:
        return "an error interrupted the pipe"
    return None if dist.is_initialized() else "the script destroyed the process group first"

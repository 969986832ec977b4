"""An account of where this rank stands, written when an error ends the job: by this rank or by another one.

A rank that hangs cannot say so itself, and it is the one that people look for.  So whoever meets an error tells the
others through the job's store; a thread of each rank looks there, and writes what its rank is doing.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
import weakref
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _process_group_name

from paci_schedule import trace
from paci_schedule.errors import LinkError
from paci_schedule.runtime.links import Links
from paci_schedule.runtime.stage import StageRunner
from paci_schedule.runtime.stopwatch import Stopwatch

__all__ = ["Account"]

logger = logging.getLogger(__name__)

_NEWEST = 60  # ops
_LONGEST = 20_000  # characters of a stack
_INTERVAL = 1.0  # seconds between two looks at the store
_PATIENCE = timedelta(seconds=4)  # for the others' accounts, since whoever started the ranks ends them with the first
_ENDED, _WRITTEN = "ended", "written"


class Account:
    """Writes this rank's position, and has the other ranks write theirs; every rank constructs its own.

    Args:
        folder: to write in.
        replica: the number of this rank's data-parallel replica.
        runner, links, stopwatch: of the stage.
    """

    def __init__(self, folder: str, replica: int, runner: StageRunner, links: Links, stopwatch: Stopwatch) -> None:
        self._folder, self._replica = folder, replica
        self._runner, self._links, self._stopwatch = runner, links, stopwatch
        self._main = threading.get_ident()
        self._written = False
        number = _process_group_name([], False)  # one that nothing else has, the same on every rank
        # A client of its own: the store's others wait in it, one at a time.
        own: dist.Store = _get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]: missing in the stub
        self._store = dist.PrefixStore(f"paci accounts {number}", own)
        stopped = threading.Event()
        weakref.finalize(self, stopped.set)  # also where the process ends, before the store does
        listening = threading.Thread(
            target=_listen, args=(weakref.ref(self), stopped), name="paci account", daemon=True
        )
        listening.start()

    def ended(self, error: Exception) -> None:
        """An error ends this rank: write, tell the others, and give them the time to write, too."""
        self._write("".join(traceback.format_exception(error)), error)
        self._ask_the_others()

    def lost(self, error: LinkError) -> None:
        """A thread has found that the stage waits in vain, while its main thread may stand still."""
        self._write(self._stack(), error)
        self._ask_the_others()

    def _ask_the_others(self) -> None:
        with suppress(RuntimeError):  # not all are there, or the store is gone
            self._store.set(_ENDED, "")
            self._store.wait([f"{_WRITTEN} {rank}" for rank in range(dist.get_world_size())], _PATIENCE)

    def _listen(self) -> bool:
        """Write if another rank has ended.  Returns whether there is more to listen for."""
        if self._written:
            return False
        if not self._store.check([_ENDED]):
            return True
        if not self._written:
            self._write(self._stack(), None)
        return False

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main)
        return "" if frame is None else "".join(traceback.format_stack(frame))

    def _write(self, stack: str, error: Exception | None) -> None:
        self._written = True
        runner, links, mono, wall = self._runner, self._links, time.perf_counter(), time.time()
        at = runner.at if runner.interrupted else None
        if isinstance(error, LinkError):
            waits_for = error.ranks
        else:
            waits_for = () if at is None or error is not None else links.awaited(at)
        position = trace.Position(
            rank=dist.get_rank(),
            ranks=dist.get_world_size(),
            stage=runner.stage,
            stages=runner.spec.stages,
            replica=self._replica,
            at=wall,
            op="" if at is None else str(at),
            version=runner.meter.version,
            forwards=runner.forwards,
            backwards=runner.backwards,
            in_flight=runner.meter.in_flight,
            waits_for=waits_for,
            error="" if error is None else f"{type(error).__name__}: {error}".partition("\n")[0][:2000],
            posted=links.under_way(),
            newest=[(str(what), start - mono, end - mono) for what, start, end in self._stopwatch.newest(_NEWEST)],
            stack=stack[-_LONGEST:],
        )
        try:
            trace.write_position(self._folder, position)
        except OSError as failed:
            logger.warning("stage %d: cannot write where it stood: %s", runner.stage, failed)
        with suppress(RuntimeError):
            self._store.set(f"{_WRITTEN} {dist.get_rank()}", "")


def _listen(account: weakref.ref[Account], stopped: threading.Event) -> None:
    """The life of an account's thread: as long as the account's, or the store's."""
    while not stopped.wait(_INTERVAL):
        one = account()
        try:
            if one is None or not one._listen():
                return
        except RuntimeError:  # the store is gone
            return
        del one

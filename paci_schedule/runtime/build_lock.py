"""The lock by which processes agree on who builds a kernel, and what becomes of those that wait for a dead builder.

PyTorch builds the kernels of its extensions, DeepSpeed's among them, on first use.  The process that builds makes a
file called lock, keeps it open and removes it at the end; every other process waits until the file is gone.  If the
builder is killed, the file stays, and all later jobs wait without end and without a word.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from torch.utils.file_baton import FileBaton

from paci_schedule.errors import PaciError

__all__ = ["watch_build_locks"]

logger = logging.getLogger(__name__)

_PAUSE = 1.0  # seconds between two looks at the lock
_IDLE = 600.0  # seconds after which a folder in which nothing changes has no builder on another machine either


def watch_build_locks() -> None:
    """From now on, let whoever waits for a lock that no process of this machine holds say so, and not wait for ever."""
    FileBaton.wait = _wait


def _wait(self: FileBaton) -> None:
    """Wait until a build has ended.

    Raises:
        PaciError: no process of this machine builds, and the folder has not changed for `_IDLE` seconds, as it
            would if another machine that shares it did.
    """
    lock, unheld = Path(self.lock_file_path).resolve(), 0
    while lock.exists():
        unheld = 0 if _is_held(lock) else unheld + 1
        if unheld > 1:  # not once only: a builder that ends closes the file before it removes it
            quiet = _seconds_since_change(lock)
            state = (
                f"{lock} is the lock of a kernel build. No process of this machine holds it, and its folder last "
                f"changed {quiet:.0f} s ago. If no other machine builds in this folder, the build was killed"
            )
            if quiet > _IDLE:
                raise PaciError(f"{state}: remove the file and start again")
            if unheld == 2 and os.environ.get("LOCAL_RANK", "0") == "0":
                logger.warning("%s: remove the file, and this job goes on; else it gives up after %.0f s", state, _IDLE)
        time.sleep(_PAUSE)


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine, as far as this user can see, has the file open, as a builder has."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(lock):
                return True
        except OSError:  # the process has ended, or is another user's
            continue
    return False


def _seconds_since_change(lock: Path) -> float:
    changes = [0.0]
    for path in (lock, lock.parent, *lock.parent.glob("*")):
        try:
            changes.append(path.stat().st_mtime)
        except FileNotFoundError:  # the build goes on
            return 0.0
    return time.time() - max(changes)

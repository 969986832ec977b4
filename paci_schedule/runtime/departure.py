"""The end of a job: do all ranks still stand together, so that they can finish what is in flight?

A rank that ends cannot know whether another one has failed or is gone.  So it asks on the host, through the job's
store, and no longer than it is told to: nobody waits for a message that will never come.
"""

from __future__ import annotations

import logging
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _process_group_name

__all__ = ["Departure"]

logger = logging.getLogger(__name__)

_A_WHILE = timedelta(seconds=2)
_READY, _DECISION, _TOGETHER = "ready", "decision", "together"


class Departure:
    """One meeting of all ranks of the job; every rank constructs its own at the same time."""

    def __init__(self) -> None:
        number = _process_group_name([], False)  # one that nothing else has, the same on every rank
        self._store = dist.PrefixStore(f"paci departure {number}", _get_default_store())
        self._ranks, self._rank = dist.get_world_size(), dist.get_rank()

    def trouble(self, own: str | None, patience: timedelta) -> str | None:
        """What keeps the ranks from going on together; they all get the same answer, or find the store gone.

        Args:
            own: what keeps this rank from it; None for nothing, and then it waits for the others.
            patience: how long to wait for them.

        Returns:
            None if every rank came, and came without trouble.
        """
        try:
            if own is not None:
                return self._decided(f"rank {self._rank}: {own}")
            if self._store.add(_READY, 1) == self._ranks:
                return self._decided(_TOGETHER)
            if self._has_come(min(patience, _A_WHILE)):
                return self._decided("")
            seconds = patience.total_seconds()
            logger.warning(
                "rank %d waits at its end for the other ranks, at most %g s, to finish with them what is in flight",
                self._rank,
                seconds,
            )
            if self._has_come(max(patience - _A_WHILE, timedelta(milliseconds=1))):
                return self._decided("")
            return self._decided(f"not all ranks came to their end within {seconds:g} s of rank {self._rank}'s")
        except RuntimeError as error:
            return f"the job's store is gone ({error})"

    def _has_come(self, patience: timedelta) -> bool:
        """Whether there is a decision within this time."""
        try:
            self._store.wait([_DECISION], patience)
        except dist.DistStoreError:
            return False
        return True

    def _decided(self, proposal: str) -> str | None:
        """What was decided, which is the first proposal made."""
        decision = self._store.compare_set(_DECISION, "", proposal).decode()
        return None if decision == _TOGETHER else decision

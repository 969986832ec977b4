"""Refusing a job on all of its ranks at once."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch.distributed as dist

from paci_schedule.errors import UnsupportedError

__all__ = ["refuse_together"]


def refuse_together(reasons: Iterable[str], said: str) -> None:
    """Raises UnsupportedError on every rank with every reason of any of them, so that none is left waiting.

    A collective of the job.

    Args:
        reasons: why this rank's part of the job cannot run.
        said: what comes before the list of reasons.
    """
    told: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(told, list(reasons))
    listed = "\n".join(f"  * {reason}" for reason in dict.fromkeys(chain.from_iterable(told)))
    if listed:
        raise UnsupportedError(f"{said}:\n{listed}")

"""Refusing a job on all of its ranks at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain

import torch.distributed as dist

from paci_schedule.errors import UnsupportedError

__all__ = ["launch_blocking", "refuse_together"]


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


def launch_blocking(said: str) -> Iterator[str]:
    """Why receives cannot be posted early, as the option that `said` names asks for, where every launch blocks."""
    value = os.environ.get("CUDA_LAUNCH_BLOCKING", "0")
    if value not in ("", "0"):
        yield (
            f"{said} with CUDA_LAUNCH_BLOCKING={value}: every op would wait for receives posted before it, and stages "
            "for each other in a circle; unset the variable, or leave the option out"
        )

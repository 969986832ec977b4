"""Recording every collective that a rank takes part in: its name, its group's ranks, and where it was called."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

__all__ = ["Collective", "record"]

_NAMES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_reduce_coalesced", "all_to_all",
    "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object",
    "monitored_barrier", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter",
)


@dataclass(frozen=True)
class Collective:
    """One call.

    Attributes:
        name: of the function.
        ranks: global ranks of its group.
        label: what the recorder was told to note beside it.
        site: the functions that led there, innermost first.
    """

    name: str
    ranks: tuple[int, ...]
    label: Any
    site: tuple[str, ...]


def record(label: Callable[[], Any]) -> list[Collective]:
    """From now on, note every collective of this process, with what `label` gives at the time."""
    seen: list[Collective] = []
    for name in _NAMES:
        function = getattr(dist, name)
        setattr(dist, name, _noting(function, name, label, seen))
    return seen


def _noting(function: Callable, name: str, label: Callable[[], Any], seen: list[Collective]) -> Callable:
    @functools.wraps(function)
    def noting(*args: Any, **kwargs: Any) -> Any:
        groups = [value for value in (*args, kwargs.get("group")) if isinstance(value, dist.ProcessGroup)]
        ranks = dist.get_process_group_ranks(groups[0]) if groups else range(dist.get_world_size())
        calls = traceback.extract_stack(limit=8)[-2::-1]
        seen.append(Collective(name, tuple(ranks), label(), tuple(call.name for call in calls)))
        return function(*args, **kwargs)

    return noting

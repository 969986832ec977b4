"""A process group that stands in for a larger one, for sums that are not to wait for all of its ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

__all__ = ["StandIn", "order"]


class StandIn(dist.ProcessGroup):
    """A group of the size of another, as which a subclass sums in its own way.

    Args:
        whole: the group that it stands in for.
        ranks: the global ranks that take part.  By these torch knows the group, for whoever records collectives, and
            for its log when one of them fails.
    """

    def __init__(self, whole: dist.ProcessGroup, ranks: list[int]) -> None:
        # The large group's size, as ZeRO asks no group of one for a sum.
        super().__init__(  # pyright: ignore[reportCallIssue]: torch's stub lacks this constructor
            whole.rank(), whole.size()
        )
        tables: list[dict[dist.ProcessGroup, Any]] = [_world.pg_map, _world.pg_names, _world.pg_backend_config]
        for table in tables:
            table[self] = table[whole]
        _world.pg_group_ranks[self] = {rank: place for place, rank in enumerate(ranks)}


def order(work: dist.Work | None) -> None:
    """Let what comes next see the result.  NCCL returns None for what the current stream does itself."""
    if work is not None:
        work.wait()

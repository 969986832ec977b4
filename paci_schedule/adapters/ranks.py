"""Which rank of a job this process is, before torch.distributed knows."""

from __future__ import annotations

import os

__all__ = ["is_rank_0"]


def is_rank_0() -> bool:
    """Whether this process is the one that speaks for the job; yes for one that no launcher started."""
    return os.environ.get("RANK", "0") == "0"

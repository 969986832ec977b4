"""Peak memory of every stage on the device: stock 1F1B against PACI, as PyTorch's allocator counts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.place import Place
from benchmarks.memory import live_peak, peaks
from testing.ranks import run_ranks

__all__ = ["run"]

_STAGES, _ACCUMULATION = 4, 8


def run(place: Place) -> dict[str, Any]:
    """Bytes above weights and optimizer states, 1F1B and PACI, and their ratio, by stage."""
    stages = 2 if place.dry else _STAGES
    ranks = run_ranks(peaks, stages, (_ACCUMULATION, 2 if place.dry else 128, _peak), timeout=place.seconds - 5)
    figures: dict[str, Any] = {}
    for stage, found in enumerate(ranks):
        figures[f"stage {stage}, 1F1B MiB"] = found["1f1b"] / 2**20
        figures[f"stage {stage}, PACI MiB"] = found["paci"] / 2**20
        figures[f"stage {stage}, PACI to 1F1B"] = found["paci"] / found["1f1b"]
    return figures


def _peak(work: Callable[[], None]) -> int:
    """The most bytes that `work` holds at once beyond what is there before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return live_peak(work)

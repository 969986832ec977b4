"""Peak memory of every stage on the device: stock 1F1B against PACI, as PyTorch's allocator counts it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from deepspeed.pipe import LayerSpec

from benchmarks.engines import SCHEDULES, engine_for
from benchmarks.gpu.place import Place
from benchmarks.memory import Block
from integration_tests.ranks import run_ranks
from paci_schedule.measure.live_bytes import LiveBytes

__all__ = ["run"]

_STAGES, _ACCUMULATION = 4, 8


def run(place: Place) -> dict[str, Any]:
    """Bytes above weights and optimizer states, 1F1B and PACI, and their ratio, by stage."""
    stages = 2 if place.dry else _STAGES
    ranks = run_ranks(_peaks, stages, (2 if place.dry else 128,), timeout=place.seconds - 5)
    figures: dict[str, Any] = {}
    for stage, peaks in enumerate(ranks):
        figures[f"stage {stage}, 1F1B MiB"] = peaks["1f1b"] / 2**20
        figures[f"stage {stage}, PACI MiB"] = peaks["paci"] / 2**20
        figures[f"stage {stage}, PACI to 1F1B"] = peaks["paci"] / peaks["1f1b"]
    return figures


def _peaks(samples: int) -> dict[str, int]:
    stages, peaks = torch.distributed.get_world_size(), {}
    for schedule in SCHEDULES:
        layers = [LayerSpec(Block)] * (4 * stages)
        engine = engine_for(layers, schedule, accumulation=_ACCUMULATION, micro_batch=samples)
        data = itertools.repeat((torch.ones(samples, 256, 128), torch.zeros(samples, 256, 128)))
        for _ in range(2):  # gradients and optimizer states come into being
            engine.train_batch(data)
        engine.reset_activation_shape()  # so that both make their message buffers anew
        peaks[schedule] = _peak(lambda engine=engine, data=data: [engine.train_batch(data) for _ in range(3)])
        del engine
    return peaks


def _peak(work: Any) -> int:
    """The most bytes that `work` holds at once beyond what is there before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as counter:
        work()
    return counter.peak

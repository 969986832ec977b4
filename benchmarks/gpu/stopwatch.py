"""The engine's own account of its time, `pipeline_stats()`, against the device's clock and against the profiler."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.engines import engine_for
from benchmarks.gpu.place import Failed, Place
from testing.ranks import run_ranks

__all__ = ["run"]


def run(place: Place) -> dict[str, Any]:
    """Seconds of three accounts of the same batches; raises where the engine's is more than 5% off the device's."""
    width, batches = (32, 2) if place.dry else (2048, 10)
    [seconds] = run_ranks(_account, 1, (width, batches), timeout=place.seconds - 5)
    figures = {**seconds, "engine to wall-clock": (ratio := seconds["engine"] / seconds["wall-clock"])}
    if not place.dry and abs(ratio - 1.0) > 0.05:
        raise Failed(f"the engine counted {ratio:.3f} of the wall-clock of a device that was always busy", figures)
    return figures


def _account(width: int, batches: int) -> dict[str, float]:
    on_gpu = torch.cuda.is_available()
    engine = engine_for([LayerSpec(nn.Linear, width, width)] * 16, "paci", accumulation=8, micro_batch=width)
    data = itertools.repeat((torch.randn(width, width), torch.zeros(width, width)))
    for _ in range(3):
        engine.train_batch(data)

    def timed() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(batches):
            engine.train_batch(data)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    timed()
    engine.pipeline_stats()
    wall = timed()
    counted = engine.pipeline_stats()["compute_seconds"]
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        timed()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = sum(getattr(event, key) for event in profiled.key_averages()) / 1e6
    return {"wall-clock": wall, "engine": counted, "profiler's kernels": kernels}

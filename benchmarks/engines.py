"""DeepSpeed engines for the benchmarks: the same job under each schedule."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule

import paci_schedule

__all__ = ["SCHEDULES", "Race", "engine_for", "milliseconds", "race"]

SCHEDULES = ("1f1b", "paci")


def engine_for(
    layers: list[LayerSpec], schedule: str, *, accumulation: int, micro_batch: int = 1, loss: Any = None, **config: Any
) -> Any:
    """An engine over all ranks as pipeline stages, layers spread evenly, AdamW, no clipping, nothing printed.

    Args:
        layers: of the whole model.
        schedule: the config's "pipeline_schedule".
        accumulation: micro-batches to an update.
        micro_batch: samples to a micro-batch.
        loss: of outputs and labels; mean squared error by default.
        config: further keys of the DeepSpeed config.
    """
    deepspeed.init_distributed()
    paci_schedule.register()
    module = PipelineModule(
        layers=layers,
        num_stages=torch.distributed.get_world_size(),
        loss_fn=loss or torch.nn.MSELoss(),
        partition_method="uniform",
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        config={
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "pipeline_schedule": schedule,
            **config,
        },
    )
    return engine


@dataclass
class Race:
    """What one rank saw of a race.

    Attributes:
        seconds: of every timed batch, for each schedule.
        compute_share: PACI's share of the time in F, B and STEP.
        stats: PACI's `pipeline_stats` at the end.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {schedule: [] for schedule in SCHEDULES})
    compute_share: float = 0.0
    stats: dict[str, Any] = field(default_factory=dict)


def race(engines: dict[str, Any], data: Iterator[Any], *, turns: int, batches: int, warm_up: int = 3) -> Race:
    """Train both engines in turns, so that a noisy machine disturbs both alike.

    Args:
        engines: one for each schedule.
        data: endless micro-batches.
        turns: of each engine.
        batches: timed in a turn; one more goes before, which meets the skew between the ranks.
        warm_up: batches of each engine before the first turn.
    """
    seen, compute = Race(), 0.0
    for engine in engines.values():
        for _ in range(warm_up):
            engine.train_batch(data)
    for _ in range(turns):
        for schedule, engine in engines.items():
            torch.distributed.barrier()
            engine.train_batch(data)
            engines["paci"].pipeline_stats()
            for _ in range(batches):
                begin = time.perf_counter()
                engine.train_batch(data)
                seen.seconds[schedule].append(time.perf_counter() - begin)
            if schedule == "paci":
                compute += engine.pipeline_stats()["compute_seconds"]
    seen.compute_share = compute / sum(seen.seconds["paci"])
    seen.stats = engines["paci"].pipeline_stats()
    return seen


def milliseconds(races: list[Race], accumulation: int) -> dict[str, float]:
    """Median milliseconds per micro-batch over all ranks, for each schedule."""
    return {
        schedule: 1e3 * statistics.median(s for seen in races for s in seen.seconds[schedule]) / accumulation
        for schedule in SCHEDULES
    }

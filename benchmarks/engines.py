"""DeepSpeed engines for the benchmarks: the same job under different settings, raced in the same processes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec

import paci_schedule
from paci_schedule.adapters.deepspeed import CutPipelineModule

__all__ = ["COMPARED", "Race", "engine_for", "milliseconds", "race"]

COMPARED = ("1f1b", "paci")


def engine_for(
    layers: list[LayerSpec],
    schedule: str,
    *,
    accumulation: int,
    micro_batch: int = 1,
    loss: Any = None,
    cut: str | Sequence[int] = "uniform",
    **config: Any,
) -> Any:
    """An engine over all ranks as pipeline stages, AdamW, no clipping, nothing printed.

    Args:
        layers: of the whole model.
        schedule: the config's "pipeline_schedule".
        accumulation: micro-batches to an update.
        micro_batch: samples to a micro-batch.
        loss: of outputs and labels; mean squared error by default.
        cut: of the layers into stages, a method or bounds.
        config: further keys of the DeepSpeed config.
    """
    deepspeed.init_distributed()
    paci_schedule.register("deepspeed")
    module = CutPipelineModule(
        layers=layers,
        num_stages=torch.distributed.get_world_size(),
        loss_fn=loss or torch.nn.MSELoss(),
        partition_method=cut,
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
    """What one rank saw of a race, for each engine by name.

    Attributes:
        seconds: of every timed batch.
        compute_share: of the time in F, B and STEP; PACI's engines only.
        stats: `pipeline_stats` at the end; PACI's engines only.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    compute_share: dict[str, float] = field(default_factory=dict)
    stats: dict[str, dict[str, Any]] = field(default_factory=dict)


def race(engines: Mapping[str, Any], data: Iterator[Any], *, turns: int, batches: int, warm_up: int = 3) -> Race:
    """Train all engines in turns, so that a noisy machine disturbs them alike.

    Args:
        engines: by name.
        data: endless micro-batches.
        turns: of each engine.
        batches: timed in a turn; one more goes before, which meets the skew between the ranks.
        warm_up: batches of each engine before the first turn.
    """
    seen, compute = Race(), dict.fromkeys(engines, 0.0)
    counting = {name: engine for name, engine in engines.items() if hasattr(engine, "pipeline_stats")}
    for engine in engines.values():
        for _ in range(warm_up):
            engine.train_batch(data)
    for _ in range(turns):
        for name, engine in engines.items():
            torch.distributed.barrier()
            engine.train_batch(data)
            if name in counting:
                engine.pipeline_stats()
            for _ in range(batches):
                begin = time.perf_counter()
                engine.train_batch(data)
                seen.seconds[name].append(time.perf_counter() - begin)
            if name in counting:
                compute[name] += engine.pipeline_stats()["compute_seconds"]
    for name, engine in counting.items():
        seen.compute_share[name] = compute[name] / sum(seen.seconds[name])
        seen.stats[name] = engine.pipeline_stats()
    seen.seconds = dict(seen.seconds)
    return seen


def milliseconds(races: list[Race], accumulation: int) -> dict[str, float]:
    """Median milliseconds per micro-batch over all ranks, for each engine."""
    return {
        name: 1e3 * statistics.median(s for seen in races for s in seen.seconds[name]) / accumulation
        for name in races[0].seconds
    }

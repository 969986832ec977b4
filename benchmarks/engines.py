"""DeepSpeed engines for the benchmarks: the same job under each schedule."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule

import paci_schedule

__all__ = ["SCHEDULES", "engine_for"]

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

"""Mixtures of experts (`deepspeed.moe`) inside a stage: their groups, and what they do not run with.

DeepSpeed spreads the experts of a layer, and their gradients, over the replicas of its stage, never over stages.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils import groups

from paci_schedule.adapters.deepspeed.options import PaciOptions

__all__ = ["expert_reasons", "make_expert_groups"]


def expert_reasons(config: DeepSpeedConfig, options: PaciOptions, module: PipelineModule) -> Iterator[str]:
    """Why the experts of this stage cannot run: the value, the rule and the remedy."""
    sizes = _sizes(module)
    if not sizes:
        return
    largest, raw, grid = max(sizes), config._param_dict, module.mpu()
    assert grid is not None
    assert module.num_stages is not None  # the module's constructor has worked it out
    if grid.get_slice_parallel_world_size() > 1:
        yield "deepspeed.moe.MoE layers with tensor parallelism: their groups mix slices; use one slice"
    if options.prediction != "off":
        yield (
            f'"paci": {{"prediction": {options.prediction!r}}} with deepspeed.moe.MoE layers: predictions are gathered '
            'over other groups than experts; use "prediction": "off"'
        )
    if not config.gradient_clipping:
        return
    clipping = f'"gradient_clipping": {config.gradient_clipping:g} with deepspeed.moe.MoE layers'
    has_masters = any((raw.get(block) or {}).get("enabled") for block in ("bf16", "fp16"))
    if not (has_masters or (raw.get("zero_optimization") or {}).get("stage")):
        if largest > 1:
            yield (
                f"{clipping} of ep_size={largest}: without masters a replica would clip by the norm of its own "
                'experts; use ep_size=1, or "gradient_clipping": 0'
            )
    elif options.clip == "global" and module.num_stages > 1:
        yield (
            f"{clipping}: optimizers with masters or ZeRO sum up the norms of experts apart, and these do not "
            'travel between stages; use "paci": {"clip": "stage"}, or "gradient_clipping": 0'
        )


def make_expert_groups(config: DeepSpeedConfig, module: PipelineModule) -> None:
    """Make the groups of all experts of the job; every rank calls it.

    DeepSpeed makes them on the stages that have experts, while torch wants every rank to take part: its own engine
    hangs if a stage has none.
    """
    gathered: list[set[int]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, _sizes(module))
    for size in sorted(set().union(*gathered)):
        groups.mpu = module.mpu()
        if f"ep_size_{size}" not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                size, use_data_before_expert_parallel_=config.use_data_before_expert_parallel_
            )


def _sizes(module: PipelineModule) -> set[int]:
    return {part.ep_size for part in module.modules() if isinstance(part, MoE)}

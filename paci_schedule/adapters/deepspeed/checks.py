"""What PACI refuses on DeepSpeed, said before training starts: the value, the rule, the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from deepspeed.moe.layer import MoE
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.module import PipelineModule

from paci_schedule.adapters.deepspeed.options import PaciOptions
from paci_schedule.adapters.refusal import launch_blocking, refuse_together

__all__ = ["check_supported"]


def check_supported(config: DeepSpeedConfig, options: PaciOptions, module: PipelineModule) -> None:
    """Raises UnsupportedError with every reason why this job cannot run under PACI.

    Call it on every rank: what one stage cannot run, all of them refuse, so that none is left waiting.
    """
    reasons = chain(
        _config_reasons(config, module.num_stages),
        _module_reasons(module),
        _tie_reasons(config, options, module),
        _receive_reasons(config, options),
    )
    refuse_together(reasons, '"pipeline_schedule": "paci" cannot run this job; change what follows, or use "1f1b"')


def _config_reasons(config: DeepSpeedConfig, stages: int) -> Iterator[str]:
    raw: Mapping[str, Any] = config._param_dict
    if config.float16_config.enabled and config.float16_config.loss_scale == 0:
        yield (
            '"fp16" with dynamic loss scaling ("loss_scale": 0): each stage would choose its own scale; '
            'use "bf16", or a fixed "loss_scale"'
        )
    if config.zero_optimization_stage > 1:
        yield (
            f'"zero_optimization": {{"stage": {config.zero_optimization_stage}}}: the pipeline engine partitions '
            "optimizer states at most; use stage 0 or 1"
        )
    autocast = raw.get("torch_autocast", {})
    if autocast.get("enabled") and "16" in str(autocast.get("dtype")) and "bf" not in str(autocast.get("dtype")):
        yield '"torch_autocast" in float16 scales the loss dynamically; use "dtype": "bfloat16"'
    routing = raw.get("data_efficiency", {}).get("data_routing", {})
    if routing.get("random_ltd", {}).get("enabled"):
        yield '"random_ltd" changes the shapes between stages from step to step; switch it off'
    if raw.get("curriculum_learning", {}).get("enabled"):
        yield (
            'the legacy block "curriculum_learning" changes the sequence length inside the engine; '
            'use "data_efficiency": {"data_sampling": ...} or change the data'
        )

    if config.wall_clock_breakdown and stages > 1:
        said = '"wall_clock_breakdown": true' if raw.get("wall_clock_breakdown") else '"flops_profiler"'
        yield (
            f"{said}: DeepSpeed starts the same timer twice on every stage but the last, "
            "under 1F1B too; switch it off, engine.pipeline_stats() says where the time goes"
        )


def _module_reasons(module: PipelineModule) -> Iterator[str]:
    if module.dynamic_shape:
        yield "PipelineModule(dynamic_shape=True): PACI posts receives before their sizes are sent; pad to one shape"
    if any(isinstance(part, MoE) for part in module.modules()):
        yield "deepspeed.moe.MoE layers reduce over groups that span stages; use dense layers"


def _tie_reasons(config: DeepSpeedConfig, options: PaciOptions, module: PipelineModule) -> Iterator[str]:
    across = sorted(key for key, comm in module.tied_comms.items() if len(comm["ranks"]) > 1)
    if across and config.gradient_clipping > 0 and options.clip == "stage":
        yield (
            f'"paci": {{"clip": "stage"}} with weights tied across stages ({", ".join(across)}) and '
            f'"gradient_clipping": {config.gradient_clipping:g}: each stage would scale the common gradient by its own '
            'norm and the copies would drift apart; use "clip": "global", or "gradient_clipping": 0'
        )


def _receive_reasons(config: DeepSpeedConfig, options: PaciOptions) -> Iterator[str]:
    if not options.early_receives:
        return
    said = '"paci": {"early_receives": true}'
    yield from launch_blocking(said)
    if config._param_dict.get("activation_checkpointing", {}).get("synchronize_checkpoint_boundary"):
        yield (
            f'{said} with "activation_checkpointing": {{"synchronize_checkpoint_boundary": true}}: every checkpointed '
            "layer would wait for receives posted before it, and stages for each other in a circle; switch one of the "
            "two off"
        )

"""What PACI refuses on DeepSpeed before training starts: the value, the rule, the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule

from paci_schedule.adapters.deepspeed.experts import expert_reasons
from paci_schedule.adapters.deepspeed.options import PaciOptions
from paci_schedule.adapters.deepspeed.replaced import why_bypassed
from paci_schedule.adapters.refusal import Refusal, launch_blocking, reasons, refuse_together
from paci_schedule.core.spec import PipelineSpec

__all__ = ["check_supported", "refused"]


def check_supported(
    name: str, config: DeepSpeedConfig, options: PaciOptions, module: PipelineModule, engine: type[PipelineEngine]
) -> None:
    """Raises UnsupportedError with every reason why this job cannot run under the schedule called `name`.

    Every rank calls it: what one stage cannot run, all of them refuse, so that none is left waiting.

    Args:
        name: of the schedule.
        config: of the job.
        options: of the schedule.
        module: the model.
        engine: the class of the engine.
    """
    assert module.num_stages is not None  # its constructor has worked it out
    spec = PipelineSpec(stages=module.num_stages, accumulation=config.gradient_accumulation_steps)
    found = chain(
        reasons(_CONFIG, config._param_dict),
        expert_reasons(config, options, module),
        _tie_reasons(config, options, module),
        _receive_reasons(config, options),
        why_bypassed(engine, spec),
    )
    refuse_together(found, refused(name))


def refused(name: str) -> str:
    """What the refusal of a schedule begins with."""
    return f'"pipeline_schedule": "{name}" cannot run this job; change what follows, or use "1f1b"'


def _at(*path: str) -> Callable[[Mapping[str, Any]], Any]:
    """Reads the value that stands at this path of a DeepSpeed config; None where there is none."""

    def read(config: Mapping[str, Any]) -> Any:
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return read


def _scales_itself(fp16: Any) -> bool:
    return isinstance(fp16, Mapping) and bool(fp16.get("enabled")) and not fp16.get("loss_scale")


def _is_in_float16(autocast: Any) -> bool:
    dtype = str(autocast.get("dtype")) if isinstance(autocast, Mapping) and autocast.get("enabled") else ""
    return "16" in dtype and "bf" not in dtype


_CONFIG = (
    Refusal(
        _at("fp16"),
        '"fp16" with dynamic loss scaling ("loss_scale": 0)',
        'each stage would choose its own scale; use "bf16", or a fixed "loss_scale"',
        lambda fp16: not _scales_itself(fp16),
    ),
    Refusal(
        _at("zero_optimization", "stage"),
        '"zero_optimization": {"stage": {value!r}}',
        "the pipeline engine partitions optimizer states at most; use stage 0 or 1",
        lambda stage: stage in (None, 0, 1),
    ),
    Refusal(
        _at("torch_autocast"),
        '"torch_autocast" in float16',
        'it scales the loss dynamically; use "dtype": "bfloat16"',
        lambda autocast: not _is_in_float16(autocast),
    ),
    Refusal(
        _at("data_efficiency", "data_routing", "random_ltd", "enabled"),
        '"random_ltd"',
        "it changes the shapes between stages from step to step; switch it off",
    ),
    Refusal(
        _at("curriculum_learning", "enabled"),
        'the legacy block "curriculum_learning"',
        'it changes the sequence length inside the engine; use "data_efficiency": {"data_sampling": ...} or change the '
        "data",
    ),
    Refusal(
        _at("checkpoint", "writer", "decoupled"),
        '"checkpoint": {"writer": {"decoupled": true}}',
        "DeepSpeed completes such a checkpoint in engine.step(), which no pipeline engine runs, so that it would never "
        "be named in the file latest; leave it out",
    ),
    Refusal(
        _at("datastates_ckpt"),
        '"datastates_ckpt"',
        "it writes in the background, and nobody says when a checkpoint is complete; leave it out",
    ),
    Refusal(
        _at("nebula", "enabled"),
        '"nebula"',
        "it writes in the background to a place of its own; leave it out",
    ),
    Refusal(
        _at("autotuning", "enabled"),
        '"autotuning"',
        "DeepSpeed's autotuner measures engine.step(), which no pipeline engine runs; switch it off, and search the "
        "micro-batch size and the stages with `paci plan`",
    ),
)


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
    option = '"paci": {"early_receives": true}'
    yield from launch_blocking(option)
    if _at("comms_logger", "enabled")(config._param_dict):
        yield (
            f'{option} with "comms_logger": it waits for the whole device at every collective, and so for receives '
            "posted before it, and stages for each other in a circle; switch one of the two off"
        )
    if _at("activation_checkpointing", "synchronize_checkpoint_boundary")(config._param_dict):
        yield (
            f'{option} with "activation_checkpointing": {{"synchronize_checkpoint_boundary": true}}: every '
            "checkpointed layer would wait for receives posted before it, and stages for each other in a circle; "
            "switch one of the two off"
        )

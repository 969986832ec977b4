"""The DeepSpeed JSON of a run, with a few values put over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.errors import LaunchError

__all__ = ["deepspeed_config"]


def deepspeed_config(
    path: Path,
    *,
    pipeline_schedule: str | None = None,
    prediction: str | None = None,
    prediction_reach: float | None = None,
    micro_batch_size: int | None = None,
    accumulation: int | None = None,
    optimizer: str | None = None,
    learning_rate: float | None = None,
) -> dict[str, Any]:
    """Read the JSON at `path`; what is not None replaces its value.

    Args:
        path: a DeepSpeed configuration.
        pipeline_schedule: "1f1b" or "paci".
        prediction: of the weights for PACI's stale forwards, as the JSON's "paci": {"prediction": ...} has it.
        prediction_reach: likewise, how far along the expected update they lie.
        micro_batch_size: sequences in a micro-batch.
        accumulation: micro-batches per update.
        optimizer: "adamw" or "nadamw", whose look-ahead in the momentum helps delayed gradients; learning rate, betas,
            eps and weight decay stay the JSON's.
        learning_rate: the peak.

    Raises:
        LaunchError: the file cannot be read as JSON, or has no optimizer with parameters.
    """
    try:
        config = json.loads(path.read_text())
        kept = config["optimizer"]["params"]
    except (OSError, json.JSONDecodeError) as error:
        raise LaunchError(f"--deepspeed-config {str(path)!r}: cannot be read as JSON ({error})") from None
    except (KeyError, TypeError):
        raise LaunchError(f"--deepspeed-config {str(path)!r}: needs an optimizer with params") from None
    if pipeline_schedule is not None:
        config["pipeline_schedule"] = pipeline_schedule
    for name, value in (("prediction", prediction), ("prediction_reach", prediction_reach)):
        if value is not None:
            config["paci"] = {**config.get("paci", {}), name: value}
    if micro_batch_size is not None:
        config["train_micro_batch_size_per_gpu"] = micro_batch_size
    if accumulation is not None:
        config["gradient_accumulation_steps"] = accumulation
    if micro_batch_size is not None or accumulation is not None:
        config.pop("train_batch_size", None)  # DeepSpeed works it out
    if optimizer is not None:
        kept = {name: kept[name] for name in ("lr", "betas", "eps", "weight_decay") if name in kept}
        if optimizer == "adamw":
            config["optimizer"] = {"type": "AdamW", "params": kept | {"torch_adam": True}}
        else:
            config["optimizer"] = {"type": "NAdam", "params": kept | {"decoupled_weight_decay": True}}
            config["zero_allow_untested_optimizer"] = True
    if learning_rate is not None:
        config["optimizer"]["params"]["lr"] = learning_rate
    return config

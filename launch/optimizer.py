"""Parameter groups and the learning-rate schedule.  Both are a stage's own: under PACI each stage updates by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["optimizer_name", "warm_up_cosine", "weight_decay_groups"]


def weight_decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings, decayed as the optimizer's config says; biases and norms, never decayed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() > 1]},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


def optimizer_name(optimizer: Optimizer) -> str:
    """Its class; "NAdamW" for `torch.optim.NAdam` with decoupled weight decay."""
    name = type(optimizer).__name__
    return "NAdamW" if name == "NAdam" and optimizer.defaults["decoupled_weight_decay"] else name


def warm_up_cosine(updates: int, warm_up: int, floor: float = 0.1) -> Callable[[Optimizer], LambdaLR]:
    """Linear warm-up to the optimizer's learning rate, then a cosine down to `floor` of it at the last update.

    Args:
        updates: in the whole run.
        warm_up: updates until the full rate is reached.
        floor: share of the full rate that is left in the end.
    """

    def share(update: int) -> float:
        if update < warm_up:
            return (update + 1) / warm_up
        done = min(1.0, (update - warm_up) / max(1, updates - warm_up))
        return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

    return lambda optimizer: LambdaLR(optimizer, share)

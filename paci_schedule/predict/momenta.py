"""The gradient that the momentum of each known optimizer expects: the one that would not change its direction.

A function takes the optimizer, a parameter's group, the optimizer's state of the parameter, and the parameter's value;
it returns None where there is no momentum (yet).  Decay that the step adds to its gradients is taken out again.

The optimizers are known by the names of their classes, because most of them cannot be imported everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["MOMENTA", "Momentum"]

Momentum = Callable[[Optimizer, Mapping[str, Any], Mapping[str, Any], torch.Tensor], torch.Tensor | None]


def _of_adam(
    optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor
) -> torch.Tensor | None:
    """The first moment, its bias corrected."""
    if not state:
        return None
    mean = state["exp_avg"] / (1 - group["betas"][0] ** state["step"])
    return mean if group["decoupled_weight_decay"] else mean.sub_(weight, alpha=group["weight_decay"])


def _of_fused_adam(
    optimizer: Any, group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor
) -> torch.Tensor | None:
    """The same as `_of_adam`; the steps are counted in the group."""
    if not state or not group.get("step"):
        return None
    mean = state["exp_avg"] / (1 - group["betas"][0] ** group["step"] if group["bias_correction"] else 1)
    return mean if optimizer.adam_w_mode else mean.sub_(weight, alpha=group["weight_decay"])


def _of_sgd(
    optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor
) -> torch.Tensor | None:
    """The gradient that leaves the buffer as it is; SGD counts no steps, so no bias can be corrected."""
    buffer, undamped = state.get("momentum_buffer"), 1 - group["dampening"]
    if buffer is None or not undamped:
        return None
    return (buffer * ((1 - group["momentum"]) / undamped)).sub_(weight, alpha=group["weight_decay"])


def _of_muon(
    optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor
) -> torch.Tensor | None:
    """The buffer itself: orthogonalisation takes its size away."""
    return state["momentum_buffer"].clone() if state else None


def _of_average(
    name: str, optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor
) -> torch.Tensor | None:
    """The moving average with this name, for optimizers that do not read its size."""
    return _undecayed(optimizer, group, state[name].clone(), weight) if state else None


def _of_soap(
    optimizer: Any, group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor
) -> torch.Tensor | None:
    """The first moment, its bias corrected, brought back from the basis in which the optimizer keeps it."""
    if not state or not state["step"]:
        return None
    mean = state["Q_L"] @ state["exp_avg"] @ state["Q_R"].T
    if optimizer.correct_bias:
        mean /= 1 - group["betas"][0] ** state["step"]
    return _undecayed(optimizer, group, mean, weight)


def _undecayed(
    optimizer: Optimizer, group: Mapping[str, Any], mean: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Take out, in place, the decay that an emerging optimizer adds to its gradients."""
    return mean.sub_(weight, alpha=group["weight_decay"]) if _decay_of(optimizer) == "l2" else mean


def _decay_of(optimizer: Optimizer) -> str:
    return getattr(optimizer, "weight_decay_method", "l2")  # as the package has it


_EMERGING = "emerging_optimizers"  # NVIDIA's package

MOMENTA: Mapping[str, Momentum] = MappingProxyType(
    {
        "torch.optim.adam.Adam": _of_adam,
        "torch.optim.adamw.AdamW": _of_adam,
        "torch.optim.nadam.NAdam": _of_adam,
        "torch.optim.sgd.SGD": _of_sgd,
        "torch.optim.Muon": _of_muon,
        "apex.optimizers.fused_adam.FusedAdam": _of_fused_adam,
        "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam": _of_fused_adam,
        f"{_EMERGING}.orthogonalized_optimizers.orthogonalized_optimizer.OrthogonalizedOptimizer": partial(
            _of_average, "momentum_buffer"
        ),
        f"{_EMERGING}.scalar_optimizers.lion.Lion": partial(_of_average, "exp_avg"),
        f"{_EMERGING}.soap.soap.SOAP": _of_soap,
    }
)
"""Module and name of a class -> its function, which holds for subclasses too."""

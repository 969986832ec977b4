"""The gradient that an optimizer's momentum expects, for a prediction before any part of the gradient is there.

It is the gradient that would leave the direction of the momentum as it is.  Decay that an optimizer adds to its
gradients, and the sign that `maximize` turns, are taken out of the momentum, as the step puts them in again.

Apex's and Transformer Engine's FusedAdam are known by name, as they cannot be imported everywhere.  They count their
steps in the parameter group (`apex/optimizers/fused_adam.py`, `transformer_engine/pytorch/optimizers/fused_adam.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from paci_schedule.errors import UnsupportedError

__all__ = ["check", "expected_gradient"]


def check(optimizer: Optimizer) -> None:
    """Raises UnsupportedError where the optimizer cannot be predicted."""
    if _momentum_of(optimizer) is None:
        names = ", ".join(cls.__name__ for cls in _MOMENTA)
        raise UnsupportedError(
            f"optimizer {type(optimizer).__name__}: prediction is known for {names} and their subclasses, for the "
            "FusedAdam of Apex and Transformer Engine, and for the Muons, Lion and SOAP of emerging_optimizers; switch "
            "prediction off, take one of these, or add what its momentum expects to paci_schedule/predict/momentum.py "
            "if it treats every parameter by itself"
        )
    if _is_fused(optimizer):
        unlike = [name for name in ("capturable", "master_weights", "use_master", "use_decoupled_grad")
                  if getattr(optimizer, name, False)]
        unlike += [name for name in ("exp_avg_dtype", "exp_avg_sq_dtype")
                   if getattr(optimizer, name, torch.float32) != torch.float32]
        if unlike:
            raise UnsupportedError(
                f"optimizer {type(optimizer).__name__} with {', '.join(unlike)}: prediction is known for states in "
                "fp32 and masters of the caller's; switch it off, or leave these out"
            )


@torch.no_grad()
def expected_gradient(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor | None:
    """What the momentum expects for a parameter of the group; None where there is no momentum (yet).

    Args:
        optimizer: one that `check` lets pass.
        group: the parameter's group.
        parameter: as the optimizer knows it.
        weight: its value.
    """
    mean = _momentum_of(optimizer)(group, optimizer.state.get(parameter, {}), weight)
    return mean.neg() if mean is not None and group.get("maximize") else mean


def _of_adam(group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor) -> torch.Tensor | None:
    """The first moment, its bias corrected."""
    if not state:
        return None
    mean = state["exp_avg"] / (1 - group["betas"][0] ** state["step"])
    return mean if group["decoupled_weight_decay"] else mean.sub_(weight, alpha=group["weight_decay"])


def _of_fused_adam(
    decoupled: bool, group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor
) -> torch.Tensor | None:
    """As `_of_adam`."""
    if not state or not group.get("step"):
        return None
    mean = state["exp_avg"] / (1 - group["betas"][0] ** group["step"] if group["bias_correction"] else 1)
    return mean if decoupled else mean.sub_(weight, alpha=group["weight_decay"])


def _of_sgd(group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor) -> torch.Tensor | None:
    """The gradient that leaves the buffer as it is; SGD keeps no count of its steps to correct a bias by."""
    buffer, undamped = state.get("momentum_buffer"), 1 - group["dampening"]
    if buffer is None or not undamped:
        return None
    return (buffer * ((1 - group["momentum"]) / undamped)).sub_(weight, alpha=group["weight_decay"])


def _of_muon(group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor) -> torch.Tensor | None:
    """The buffer itself: orthogonalisation takes its size away."""
    return state["momentum_buffer"].clone() if state else None


def _of_average(
    name: str, optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor
) -> torch.Tensor | None:
    """The moving average of that name itself, where nothing reads its size."""
    return _undecayed(optimizer, group, state[name].clone(), weight) if state else None


def _of_soap(
    optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor
) -> torch.Tensor | None:
    """The first moment, its bias corrected, out of the basis in which it is kept."""
    if not state or not state["step"]:
        return None
    mean = state["Q_L"] @ state["exp_avg"] @ state["Q_R"].T
    if optimizer.correct_bias:
        mean /= 1 - group["betas"][0] ** state["step"]
    return _undecayed(optimizer, group, mean, weight)


def _undecayed(
    optimizer: Optimizer, group: Mapping[str, Any], mean: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Without the decay that an emerging optimizer adds to its gradients, in place."""
    return mean.sub_(weight, alpha=group["weight_decay"]) if optimizer.weight_decay_method == "l2" else mean


_Momentum = Callable[[Mapping[str, Any], Mapping[str, Any], torch.Tensor], torch.Tensor | None]
_MOMENTA: Mapping[type[Optimizer], _Momentum] = {
    torch.optim.Adam: _of_adam,
    torch.optim.AdamW: _of_adam,
    torch.optim.NAdam: _of_adam,
    torch.optim.SGD: _of_sgd,
    **({torch.optim.Muon: _of_muon} if hasattr(torch.optim, "Muon") else {}),  # since torch 2.9
}

_FUSED = ("apex.optimizers.fused_adam.FusedAdam", "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam")


def _is_fused(optimizer: Optimizer) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}" in _FUSED for cls in type(optimizer).__mro__)


_EMERGING = {
    "orthogonalized_optimizers.orthogonalized_optimizer.OrthogonalizedOptimizer": partial(
        _of_average, "momentum_buffer"
    ),
    "scalar_optimizers.lion.Lion": partial(_of_average, "exp_avg"),
    "soap.soap.SOAP": _of_soap,
}
"""By name, of NVIDIA's package emerging_optimizers, which is not imported for this.  The first one is Muon's."""


def _momentum_of(optimizer: Optimizer) -> _Momentum | None:
    if _is_fused(optimizer):
        return partial(_of_fused_adam, bool(optimizer.adam_w_mode))
    for cls in type(optimizer).__mro__:
        if cls in _MOMENTA:
            return _MOMENTA[cls]
        package, _, module = cls.__module__.partition(".")
        if package == "emerging_optimizers" and f"{module}.{cls.__qualname__}" in _EMERGING:
            return partial(_EMERGING[f"{module}.{cls.__qualname__}"], optimizer)
    return None

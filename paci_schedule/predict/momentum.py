"""The gradient that an optimizer's momentum expects, for a prediction before any part of the gradient is there.

This gradient would leave the direction of the momentum as it is.  Decay that an optimizer adds to its gradients, and
the sign that `maximize` turns, are taken out of the momentum, because the step puts them in again.

An optimizer that `momenta` does not know can itself define what it expects, by a method `expected_gradient(group,
state, weight)`, which returns what the function of that name does, before `maximize` turns its sign.  It must treat
every parameter by itself, and its `step` must be right in another object of its class that holds copies of its state
(`predict.shadow`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from paci_schedule.errors import UnsupportedError
from paci_schedule.predict.momenta import MOMENTA
from paci_schedule.predict.shadow import state_of

__all__ = ["check", "expected_gradient"]

_OTHERWISE = {"capturable", "master_weights", "use_master", "use_decoupled_grad"}  # a FusedAdam must have these off
_STATES = {"exp_avg_dtype", "exp_avg_sq_dtype"}


def check(optimizer: Optimizer, reach: float = 1.0) -> None:
    """Raises UnsupportedError where the optimizer cannot be predicted, or cannot with this reach."""
    if _momentum_of(optimizer) is None:
        names = ", ".join(name.rpartition(".")[2] for name in MOMENTA if name.startswith("torch."))
        raise UnsupportedError(
            f"optimizer {type(optimizer).__name__}: prediction is known for {names} and their subclasses, for the "
            "FusedAdam of Apex and Transformer Engine, for the Muons, Lion and SOAP of emerging_optimizers, and in "
            "DeepSpeed's engine for its FusedAdam and DeepSpeedCPUAdam; switch prediction off, take one of these, or, "
            "if it treats every parameter by itself, give its class a method expected_gradient(group, state, weight) "
            "(paci_schedule/predict/momentum.py)"
        )
    if any(cls.__module__.startswith(("apex.", "transformer_engine.")) for cls in type(optimizer).__mro__):
        unlike = sorted(name for name in _OTHERWISE if getattr(optimizer, name, False))
        unlike += sorted(name for name in _STATES if getattr(optimizer, name, torch.float32) != torch.float32)
        if unlike:
            raise UnsupportedError(
                f"optimizer {type(optimizer).__name__} with {', '.join(unlike)}: prediction is known for states in "
                "fp32 and masters of the caller's; switch it off, or leave these out"
            )
    if reach == 1:
        return
    if not all(isinstance(group.get("lr"), int | float | torch.Tensor) for group in optimizer.param_groups):
        raise UnsupportedError(
            f"optimizer {type(optimizer).__name__} with prediction_reach={reach}: a reach lengthens a step by the "
            'learning rate "lr" of every parameter group, which one of them does not have; take a reach of 1'
        )
    if getattr(optimizer, "weight_decay_method", None) == "independent":
        raise UnsupportedError(
            f"optimizer {type(optimizer).__name__} with prediction_reach={reach}: its independent weight decay does "
            "not follow the learning rate, by which a reach lengthens a step; take another decay, or a reach of 1"
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
        weight: the parameter's value.
    """
    momentum = _momentum_of(optimizer)
    assert momentum is not None, "`check` has let the optimizer pass"
    mean = momentum(group, state_of(optimizer, group, parameter), weight)
    return mean.neg() if mean is not None and group.get("maximize") else mean


def _momentum_of(optimizer: Optimizer) -> Callable[..., torch.Tensor | None] | None:
    own = getattr(optimizer, "expected_gradient", None)
    if own is not None:
        return own
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(optimizer).__mro__)
    known = next((MOMENTA[name] for name in names if name in MOMENTA), None)
    return None if known is None else partial(known, optimizer)

"""Predicted weights: what a new optimizer of the same kind makes of copies of the weights, from a copy of the state."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

__all__ = ["expected_gradient", "stepped_copies"]


def stepped_copies(
    optimizer: torch.optim.Optimizer,
    steps: int,
    reach: float,
    gradient: Callable[[torch.Tensor], torch.Tensor | None],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What an optimizer steps, each with its value after some more steps; neither it nor its state changes.

    Args:
        optimizer: of the real weights.
        steps: how many.
        reach: what the learning rates are multiplied by.
        gradient: of one of the tensors that the optimizer steps, anew for each step; None leaves it out.
    """
    groups = [
        {**group, "params": [weight.detach().clone() for weight in group["params"]]} for group in optimizer.param_groups
    ]
    other = type(optimizer)(groups, lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else it shares the tensors
    for group in other.param_groups:
        group["lr"] *= reach
    pairs = [
        (weight, value)
        for group, copied in zip(optimizer.param_groups, other.param_groups, strict=True)
        for weight, value in zip(group["params"], copied["params"], strict=True)
    ]
    for _ in range(steps):
        for weight, value in pairs:
            value.grad = gradient(weight)
        other.step()
    return [(weight, value.detach()) for weight, value in pairs]


def expected_gradient(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> torch.Tensor | None:
    """The gradient that the optimizer's momentum expects of a weight; None before the first update."""
    group = next(group for group in optimizer.param_groups if any(weight is other for other in group["params"]))
    state = optimizer.state.get(weight)
    if not state:
        return None
    if not isinstance(optimizer, torch.optim.SGD):
        return state["exp_avg"] / (1 - group["betas"][0] ** state["step"])
    momentum = state.get("momentum_buffer")
    return None if momentum is None else momentum * (1 - group["momentum"]) - group["weight_decay"] * weight.detach()

"""Weights that optimizers step themselves, as in plain fp32: a prediction needs one more copy while it stands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from paci_schedule.predict.copies import copied, write
from paci_schedule.predict.momentum import check, expected_gradient
from paci_schedule.predict.shadow import advance

__all__ = ["SteppedWeights"]


class SteppedWeights:
    """The parameters of a stage's optimizers (`prediction.Weights`).

    Args:
        optimizers: of the stage, each on parameters of its own.  The part of their gradients is in `.grad`.

    Raises:
        UnsupportedError: an optimizer cannot be predicted.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        for optimizer in optimizers:
            check(optimizer)
        self._optimizers = optimizers
        self._real: list[torch.Tensor] | None = None  # while the parameters hold a prediction

    def predict(self, windows: int, scale: float, factor: torch.Tensor | None) -> None:
        """As `Weights.predict`, by each optimizer's own step."""
        if self._real is None:
            self._real = copied(self._parameters())
        else:
            write(self._parameters(), self._real)
        for optimizer in self._optimizers:
            gradients = _part(optimizer, scale, factor) if scale else _expected(optimizer)
            advance(optimizer, {parameter: parameter for parameter in gradients}, gradients, windows)

    def restore(self) -> None:
        """As `Weights.restore`."""
        if self._real is not None:
            write(self._parameters(), self._real)
            self._real = None

    def exchange(self) -> None:
        """As `Weights.exchange`."""
        if self._real is not None:
            other = copied(self._parameters())
            write(self._parameters(), self._real)
            self._real = other

    def _parameters(self) -> list[torch.Tensor]:
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        return [parameter for group in groups for parameter in group["params"]]


def _part(optimizer: Optimizer, scale: float, factor: torch.Tensor | None) -> dict[torch.Tensor, torch.Tensor]:
    held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not held:
        return {}
    parts = torch._foreach_mul([parameter.grad for parameter in held], scale)
    if factor is not None:
        torch._foreach_mul_(parts, factor)
    return dict(zip(held, parts, strict=True))


def _expected(optimizer: Optimizer) -> dict[torch.Tensor, torch.Tensor]:
    gradients = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = expected_gradient(optimizer, group, parameter, parameter.detach())
            if gradient is not None:
                gradients[parameter] = gradient
    return gradients

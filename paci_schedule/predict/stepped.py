"""The weights of optimizers that step them directly, as in plain fp32; a prediction takes one more copy of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from paci_schedule.predict.copies import copied, write
from paci_schedule.predict.momentum import expected_gradient
from paci_schedule.predict.shadow import advance, pieces

__all__ = ["SteppedWeights"]


class SteppedWeights:
    """The parameters of a stage's optimizers (`prediction.Weights`).

    Args:
        optimizers: the optimizers of the stage, each with parameters of its own; `momentum.check` lets them pass.  The
            part of the gradients that is there is in `.grad`.
        deferred: parameters whose next update applies an older gradient than the one that is being summed; they are
            predicted from what their momentum expects, as all parameters are where no part of the gradient is there.
        clean: a function that does to gradients, in place, what an update does before it clips them.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        deferred: Collection[torch.Tensor] = (),
        clean: Callable[[Iterable[torch.Tensor]], None] | None = None,
    ) -> None:
        self._optimizers, self._deferred, self._clean = optimizers, frozenset(deferred), clean
        self._real: list[torch.Tensor] | None = None  # while the parameters hold a prediction

    def predict(self, windows: int, scale: float, factor: torch.Tensor | None, reach: float) -> None:
        """Predict as `Weights.predict` describes, by each optimizer's own step."""
        if self._real is None:
            self._real = copied(self._parameters())
        else:
            write(self._parameters(), self._real)
        for optimizer in self._optimizers:
            for stepping, group, entries in pieces(optimizer):
                gradients = self._part(entries, scale, factor)
                for known, of, _ in entries:
                    if not scale or of in self._deferred:
                        gradient = expected_gradient(stepping, group, known, known.detach())
                        if gradient is not None:
                            gradients[known] = gradient
                advance(stepping, {known: known for known in gradients}, gradients, windows, reach)

    def restore(self) -> None:
        """Restore as `Weights.restore` describes."""
        if self._real is not None:
            write(self._parameters(), self._real)
            self._real = None

    def exchange(self) -> None:
        """Exchange as `Weights.exchange` describes."""
        if self._real is not None:
            other = copied(self._parameters())
            write(self._parameters(), self._real)
            self._real = other

    def _parameters(self) -> list[torch.Tensor]:
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        return [parameter for group in groups for parameter in group["params"]]

    def _part(
        self, entries: Sequence[tuple[torch.Tensor, torch.Tensor, Any]], scale: float, factor: torch.Tensor | None
    ) -> dict[torch.Tensor, torch.Tensor]:
        """The gradients that are there, scaled to a whole window and clipped, by the entries of `pieces`."""
        held = [(known, of.grad[at]) for known, of, at in entries if of.grad is not None and of not in self._deferred]
        if not (scale and held):
            return {}
        parts = torch._foreach_mul([gradient for _, gradient in held], scale)
        if self._clean is not None:
            self._clean(parts)
        if factor is not None:
            torch._foreach_mul_(parts, factor)
        return {known: part for (known, _), part in zip(held, parts, strict=True)}

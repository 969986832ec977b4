"""A framework's computation whose results are looked at as they come."""

from __future__ import annotations

from typing import cast

import torch

from paci_schedule.runtime.finite import FiniteGuard
from paci_schedule.runtime.message import Payload
from paci_schedule.runtime.stage import SplitCompute, StageCompute

__all__ = ["WatchedCompute"]


class WatchedCompute:
    """What a framework computes for a stage, looked at.

    Args:
        compute: a `StageCompute` or `SplitCompute`; this is what it is.
        guard: what looks.
    """

    def __init__(self, compute: StageCompute, guard: FiniteGuard) -> None:
        self._compute, self._guard = cast(SplitCompute, compute), guard  # asked only where the schedule splits
        self._of_loss: tuple[torch.Tensor, ...] = ()

    def forward(self, micro_batch: int, inputs: Payload | None) -> Payload | None:
        outputs = self._compute.forward(micro_batch, inputs)
        if outputs is not None:
            tensors = outputs if isinstance(outputs, tuple) else (outputs,)
            self._guard.look(f"the activation of micro-batch {micro_batch}", tensors)
        return outputs

    def backward(self, micro_batch: int, gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return self._looked(micro_batch, gradients, self._compute.backward(micro_batch, gradients))

    def backward_input(self, micro_batch: int, gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return self._looked(micro_batch, gradients, self._compute.backward_input(micro_batch, gradients))

    def backward_weight(self, micro_batch: int) -> None:
        self._compute.backward_weight(micro_batch)

    def losses(self, micro_batch: int) -> torch.Tensor:
        losses = self._compute.losses(micro_batch)
        self._guard.look(f"the loss of micro-batch {micro_batch}", [losses])
        self._guard.look(f"the gradient of micro-batch {micro_batch}", self._of_loss)
        return losses

    def step(self, update: int, losses: torch.Tensor) -> None:
        self._compute.step(update, losses)

    def post_sum(self, tie: int) -> None:
        self._compute.post_sum(tie)

    def _looked(
        self, micro_batch: int, incoming: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        if incoming:
            self._guard.look(f"the gradient of micro-batch {micro_batch}", gradients)
        else:  # at the last stage, where its loss is to be looked at first
            self._of_loss = gradients
        return gradients

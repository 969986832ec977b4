"""One stage at work in a rehearsal: its forward, its backward and its update, on one device, without messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from paci_schedule.core.drift import DriftMeter
from paci_schedule.predict import Prediction, clip_factor
from paci_schedule.rehearse.stash import Stash

__all__ = ["Stage"]


@dataclass(frozen=True)
class _Saved:
    """The floating-point inputs and outputs of a forward, which the micro-batch's backward needs."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


class Stage:
    """A stage with its optimizers and its micro-batches in flight.

    Args:
        number: the number of the stage; 0 is the first.
        module: its layers.
        optimizers: the optimizers of its parameters; empty for a stage that trains nothing.
        schedulers: learning-rate schedules, which are stepped after each update.
        accumulation: the number of micro-batches in an update.
        loss_fn: the loss function on the last stage; None on the others.
        stash: the stage's weight versions; None where ops read the weights as they are.
        prediction: when the stage predicts its weights; None for never.

    Attributes:
        activations: micro-batch -> the output of the stage before, or the data on the first stage.
        gradients: micro-batch -> the gradients from the stage after.
        labels: micro-batch -> the labels for the last stage's loss function.
        meter: the counter of updates and drift.
        losses: on the last stage, the losses of the micro-batches since the last update, fp32[] each.
        last_forward: the last micro-batch whose forward is done.
    """

    def __init__(
        self,
        number: int,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[Any],
        accumulation: int,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None,
        stash: Stash | None,
        prediction: Prediction | None,
    ) -> None:
        self.number, self.module = number, module
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.activations: dict[int, Any] = {}
        self.gradients: dict[int, list[torch.Tensor]] = {}
        self.labels: dict[int, Any] = {}
        self.meter = DriftMeter()
        self.losses: list[torch.Tensor] = []
        self.last_forward = -1
        self._optimizers, self._schedulers = optimizers, schedulers
        self._accumulation, self._loss_fn = accumulation, loss_fn
        self._stash, self._prediction = stash, prediction
        self._saved: dict[int, _Saved] = {}
        self._summed = 0  # backwards since the last update
        self.forget_gradients()

    def forward(self, micro_batch: int) -> Any:
        """Run the layers on the micro-batch; returns the input of the next stage, or on the last stage the loss."""
        inputs = self.activations.pop(micro_batch)
        if self.number:
            inputs = _detached(inputs)
        window = micro_batch // self._accumulation
        if self._stash is not None:
            self._stash.forward(micro_batch, window)
        if self._prediction is not None:
            scale = self._accumulation / self._summed if self._summed else 0.0
            self._prediction.before_forward(window - self.meter.version, scale)
        torch.clear_autocast_cache()  # a caller's autocast would use its casts of older weights
        output = self.module(inputs)
        if self._loss_fn is not None:
            output = self._loss_fn(output, self.labels.pop(micro_batch))
        if self._prediction is not None:
            self._prediction.after_forward()
        self._saved[micro_batch] = _Saved(_floating(inputs) if self.number else [], _floating(output))
        self.last_forward = micro_batch
        return output

    def backward(self, micro_batch: int) -> list[torch.Tensor]:
        """Add to the parameters' gradients; returns the gradients of the inputs, for the stage before."""
        if self._stash is not None:
            self._stash.backward(micro_batch)
        saved = self._saved.pop(micro_batch)
        if self._loss_fn is not None:
            (loss,) = saved.outputs
            self.losses.append(loss.detach())
            torch.autograd.backward(loss / self._accumulation)
        else:
            pairs = zip(saved.outputs, self.gradients.pop(micro_batch), strict=True)
            trained = [pair for pair in pairs if pair[0].requires_grad]
            if trained:  # a first stage may train nothing
                outputs, gradients = zip(*trained, strict=True)
                torch.autograd.backward(outputs, gradients)
        self._summed += 1
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in saved.inputs]

    def square(self) -> torch.Tensor:
        """The squared norm of the gradients that the next update applies, fp32[]."""
        gradients = self._summed_gradients()
        if not gradients:
            device = next((parameter.device for parameter in self.module.parameters()), None)
            return torch.zeros((), device=device)
        return torch.stack(torch._foreach_norm(gradients)).float().square().sum()

    def step(self, limit: float, square: torch.Tensor | None) -> None:
        """Apply the summed gradients.

        Args:
            limit: the largest norm that the gradients may have.
            square: the squared norm that counts as that of the gradients; None for no clipping.
        """
        if self._prediction is not None:
            self._prediction.before_step()
        if self._stash is not None:
            self._stash.begin_step()
        if square is not None:
            factor = clip_factor(limit, square.sqrt())
            if self._prediction is not None:
                self._prediction.factor = factor
            gradients = self._summed_gradients()
            if gradients:
                torch._foreach_mul_(gradients, factor)
        # Backwards in flight have saved these weights; they are to run on the values after the step.
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.parameters)):
            for optimizer in self._optimizers:
                optimizer.step()
        for scheduler in self._schedulers:
            scheduler.step()
        self.forget_gradients()
        self._summed = 0
        self.losses.clear()

    def forget_gradients(self) -> None:
        """Drop the gradients summed so far."""
        for parameter in self.parameters:
            parameter.grad = None

    def show_real(self) -> None:
        """Put the real, newest weights in place for as long as the caller has control."""
        if self._prediction is not None:
            self._prediction.exchange()
        if self._stash is not None:
            self._stash.show_newest()

    def go_on(self) -> None:
        """Put back the weights that `show_real` replaced."""
        if self._prediction is not None:
            self._prediction.exchange()

    def close(self) -> None:
        """Leave the real, newest weights in the parameters' first storages, and drop everything else."""
        if self._prediction is not None:
            self._prediction.before_step()
        if self._stash is not None:
            self._stash.close()
        self.forget_gradients()
        self._saved.clear()

    def _summed_gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


def _tensors(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _floating(value: Any) -> list[torch.Tensor]:
    return [each for each in _tensors(value) if isinstance(each, torch.Tensor) and each.is_floating_point()]


def _detached(value: Any) -> Any:
    """The same values outside the graph that made them; floating-point tensors require a gradient."""
    leaves = tuple(
        each.detach().requires_grad_(each.is_floating_point()) if isinstance(each, torch.Tensor) else each
        for each in _tensors(value)
    )
    return leaves if isinstance(value, tuple | list) else leaves[0]

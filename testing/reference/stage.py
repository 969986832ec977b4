"""One stage: what a framework computes of it, and what it holds while the pipeline runs.

The graph is cut between stages: the input of a stage is a leaf, and its gradient is what the stage before goes on with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["Stage", "StageRun"]


class Stage(Protocol):
    """What a framework computes of one stage.  It may have data-parallel replicas, which share its weights.

    Attributes:
        weights: all parameters.
        loss_scale: what the gradient of a loss is multiplied by.
        divides: where gradients are divided by the number of micro-batches to an update: at the "loss", on "every"
            stage again, or "nowhere".
    """

    weights: list[nn.Parameter]
    loss_scale: float
    divides: str

    def compute(self, batch: Any, received: Any) -> Any:
        """What the next stage receives, or at the last stage the loss, a scalar.

        Args:
            batch: the micro-batch as the data has it.
            received: what the stage before has put out; None at the first stage.
        """

    def accumulate(self, replica: int) -> None:
        """Add the gradients that one backward has left to those of a replica."""

    def tied_gradient(self, key: str) -> list[torch.Tensor]:
        """A copy of the accumulated gradient of a tied weight: one of the mean, or one for each replica."""

    def take_tied(self, key: str, sums: list[list[torch.Tensor]]) -> None:
        """Replace the accumulated gradient of a tied weight by a sum.

        Args:
            key: of the weight.
            sums: what is added up: for each update that is due, one tensor, or one for each replica.
        """

    def measure(self) -> torch.Tensor:
        """The squared norm of the accumulated gradients, averaged over the replicas."""

    def apply(self, square: torch.Tensor) -> None:
        """Clip by a squared norm, update the weights and forget the gradients."""

    def predict(self, ahead: int, scale: float) -> list[list[torch.Tensor]]:
        """The weights `ahead` updates later, for each replica.

        Args:
            ahead: number of updates.
            scale: by which the accumulated gradients stand for the whole; 0 if there are none.
        """


@dataclass
class StageRun:
    """One stage while the pipeline runs.

    Attributes:
        stage: what computes.
        interval: of so many stale forwards between two updates the first one predicts its weights anew; 0 for none.
        version: updates applied.
        born: micro-batch between forward and backward -> version at its forward.
        drift: updates between forward and backward, for every micro-batch finished.
        peak: the most micro-batches between forward and backward at any time.
        window: losses of the micro-batches since the last update, in the first replica.
        windows: the same for every update.
    """

    stage: Stage
    interval: int = 0
    version: int = 0
    born: dict[int, int] = field(default_factory=dict)
    drift: list[int] = field(default_factory=list)
    peak: int = 0
    window: list[float] = field(default_factory=list)
    windows: list[list[float]] = field(default_factory=list)
    _saved: dict[tuple[int, int], tuple[list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=dict)
    _predicted: list[list[torch.Tensor]] | None = None
    _stale: int = 0  # forwards since the last update that had updates before their backward

    def __post_init__(self) -> None:
        self.real = [weight.detach().clone() for weight in self.stage.weights]

    def forward(self, micro: int, batches: list[Any], received: list[Any], accumulation: int, ahead: int) -> list[Any]:
        """Run the forward of a micro-batch in every replica.

        Args:
            micro: its number.
            batches, received: of each replica, as of `Stage.compute`.
            accumulation: a.
            ahead: how many updates come before its backward.

        Returns:
            The output of each replica.
        """
        self.predict(ahead, accumulation)
        outputs = []
        for replica, (batch, value) in enumerate(zip(batches, received, strict=True)):
            self.show(replica)
            inputs = _leaves(value)
            output = self.stage.compute(batch, inputs)
            self._saved[micro, replica] = _floating(inputs), _floating(output)
            outputs.append(output)
        if self.interval == 1:
            self._predicted = None
        self.born[micro] = self.version
        self.peak = max(self.peak, len(self.born))
        return outputs

    def backward(self, micro: int, gradients: list[Any], losses: list[float], accumulation: int) -> list[Any]:
        """Run the backward of a micro-batch in every replica.

        Args:
            micro: its number.
            gradients: of the outputs of each replica; None at the last stage.
            losses: of each replica.
            accumulation: a.

        Returns:
            The gradients of the inputs of each replica.
        """
        found = []
        for replica, gradient in enumerate(gradients):
            self.show(replica)
            inputs, outputs = self._saved.pop((micro, replica))
            if gradient is None:
                loss = outputs[0] if self.stage.divides == "nowhere" else outputs[0] / accumulation
                torch.autograd.backward(loss, torch.full_like(loss, self.stage.loss_scale))
            elif any(output.requires_grad for output in outputs):
                again = accumulation if self.stage.divides == "every" else 1
                torch.autograd.backward(outputs, [each / again for each in gradient])
            self.stage.accumulate(replica)
            found.append([leaf.grad for leaf in inputs])
        self.drift.append(self.version - self.born.pop(micro))
        self.window.append(losses[0])
        return found

    def predict(self, ahead: int, accumulation: int) -> None:
        """Predict the weights if the next forward is stale and the option asks for a prediction there."""
        if not (ahead and self.interval):
            return
        if self._stale % self.interval == 0:
            self._predicted = None
            self.show(0)
            self._predicted = self.stage.predict(ahead, accumulation / len(self.window) if self.window else 0.0)
        self._stale += 1

    def show(self, replica: int) -> None:
        """Put the weights in place that a replica computes with."""
        if self.interval:
            values = self.real if self._predicted is None else self._predicted[replica]
            for weight, value in zip(self.stage.weights, values, strict=True):
                weight.data.copy_(value)

    def begin_update(self) -> None:
        """Put the real weights in place."""
        self._predicted, self._stale = None, 0
        self.show(0)

    def values(self) -> list[torch.Tensor]:
        """The real weights, whatever is in their place."""
        return self.real if self.interval else self.stage.weights

    def end_update(self) -> None:
        """Count the update, and keep the new weights where predictions will take their place."""
        self.real = [weight.detach().clone() for weight in self.stage.weights] if self.interval else []
        self.version += 1
        self.windows.append(self.window)
        self.window = []


def _tensors(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, tuple) else [value] if value is not None else []


def _floating(value: Any) -> list[torch.Tensor]:
    return [tensor for tensor in _tensors(value) if tensor.is_floating_point()]


def _leaves(value: Any) -> Any:
    """The same tensors, outside the graph that made them; the floating ones want a gradient."""
    leaves = [tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in _tensors(value)]
    return tuple(leaves) if isinstance(value, tuple) else leaves[0] if leaves else None

"""A stage of plain PyTorch modules, with DeepSpeed's arithmetic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import nn

from testing import jobs
from testing.jobs import Job, Shared
from testing.reference import versions
from testing.reference.prediction import expected_gradient, stepped_copies
from testing.reference.updaters import MasterUpdater, ZeroArithmetic, updater_for

__all__ = ["TorchStage"]


class TorchStage:
    """One stage of a job; a `stage.Stage`.

    Args:
        job: what is trained.
        number: the stage.
        layers: of the whole model.
        replicas: of the stage.
        zero: how ZeRO computes, where the job has it.

    Attributes:
        module: the layers.
        updater: what becomes of the gradients.
        norm: that the latest update was clipped by; NaN before the first.
    """

    def __init__(self, job: Job, number: int, layers: list[nn.Module], replicas: int, zero: ZeroArithmetic) -> None:
        self.job, self.number = job, number
        self.is_last = number == job.stages - 1
        self.divides = versions.where_gradients_are_divided()
        self.loss_scale = job.config.get("fp16", {}).get("loss_scale", 1.0)
        self.module = nn.Sequential(*(layers[layer] for layer in job.stage_layers(number)))
        if job.precision != "fp32" or "fp16" in job.config:
            self.module.to(torch.float16 if "fp16" in job.config else torch.bfloat16)
        self.weights = list(self.module.parameters())
        shared = [layer for layer in self.module if isinstance(layer, Shared)]
        self.tied = {layer.key: layer.weight for layer in shared if layer.weight.requires_grad}
        # DeepSpeed lists the shared weights first.
        ordered = [*shared, *(layer for layer in self.module if not isinstance(layer, Shared))]
        parameters = [parameter for layer in ordered for parameter in layer.parameters()]
        jobs.poison(job, number, parameters)
        self.updater = updater_for(job, parameters, replicas, zero)
        self.norm = math.nan
        self._sums = [self.updater.zeros() for _ in range(replicas)]
        self._means: list[torch.Tensor] = []

    def compute(self, batch: Any, received: Any) -> Any:
        """The output of the layers, or the loss."""
        output = self.module(batch[0] if received is None else received)
        return jobs.loss(output, batch[1]) if self.is_last else output

    def accumulate(self, replica: int) -> None:
        """Take what one backward has left in `.grad`."""
        for parameter, total in zip(self.updater.parameters, self._sums[replica], strict=True):
            if parameter.grad is not None:
                total.add_(parameter.grad.to(total.dtype))
                parameter.grad = None

    def tied_gradient(self, key: str) -> list[torch.Tensor]:
        """A copy of the gradient in each replica."""
        return [sums[self._place(self.tied[key])].clone() for sums in self._sums]

    def take_tied(self, key: str, sums: list[list[torch.Tensor]]) -> None:
        """Put the sums in the place of the gradient, in each replica."""
        place = self._place(self.tied[key])
        for replica, own in enumerate(self._sums):
            own[place].zero_()
            for copies in sums:
                own[place].add_(copies[replica])

    def measure(self) -> torch.Tensor:
        """A copy of a tied weight counts on the first stage that has one; of its gradient, what is finite."""
        updater = self.updater
        self._means = updater.mean(self._sums)
        if self.tied:
            for gradient in self._means:
                gradient[~gradient.isfinite()] = 0
        elsewhere = [weight for key, weight in self.tied.items() if self.job.holders(key)[0] != self.number]
        counted = [all(parameter is not weight for weight in elsewhere) for parameter in updater.parameters]
        return updater.square(self._means, counted)

    def apply(self, square: torch.Tensor) -> None:
        """Clip and update; an update without a finite norm is left out."""
        self.norm = square.sqrt().item() if square.isfinite() else math.inf
        if square.isfinite():
            self.updater.step(self._means, square)
        self._sums = [self.updater.zeros() for _ in self._sums]

    def rate(self) -> float:
        """The learning rate of the next update; NaN where nothing is trained."""
        return self.updater.optimizer.param_groups[0]["lr"] if self.updater.optimizer else math.nan

    def names(self) -> list[str]:
        """The names of `weights`, by layer number; a shared weight has the name that DeepSpeed gives it."""
        first = self.job.stage_layers(self.number).start
        return [
            f"tied_modules.{layer.key}.{name}" if isinstance(layer, Shared) else f"{number}.{name}"
            for number, layer in enumerate(self.module, first)
            for name, _ in layer.named_parameters()
        ]

    def predict(self, ahead: int, scale: float) -> list[list[torch.Tensor]]:
        """Each replica predicts from its own part of the gradient: all weights, or with masters a shard of them."""
        values = [self._predicted(ahead, scale, sums) for sums in self._sums]
        if isinstance(self.updater, MasterUpdater):
            for number, master in enumerate(self.updater.masters):
                gathered = values[0][number].clone()
                for replica, mine in enumerate(self._shards(master)):
                    gathered[mine] = values[replica][number][mine]
                for value in values:
                    value[number] = gathered
        return [self._in_model(stepped) for stepped in values]

    def _predicted(self, ahead: int, scale: float, sums: list[torch.Tensor]) -> list[torch.Tensor]:
        """The values of what the optimizer steps, in its order."""
        updater = self.updater
        if updater.optimizer is None:
            return []

        def gradient(stepped: torch.Tensor) -> torch.Tensor | None:
            expected = expected_gradient(updater.optimizer, stepped)
            if not scale:
                return expected
            if isinstance(updater, MasterUpdater):
                [found] = [
                    flat
                    for flat, master in zip(updater.by_group(sums), updater.masters, strict=True)
                    if master is stepped
                ]
            else:
                found = sums[self._place(stepped)]
            found = found.float() * scale
            if updater.factors:
                found.mul_(torch.tensor(updater.factors[-1]).clamp(max=1.0))
            for place in self._tied_places(stepped):
                found[place] = 0.0 if expected is None else expected[place]
            return found

        values = []
        reach = self.job.options.get("prediction_reach", 1.0)
        for stepped, value in stepped_copies(updater.optimizer, ahead, reach, gradient):
            if not updater.optimizer.state.get(stepped):  # before the first update a tied weight stays
                for place in self._tied_places(stepped):
                    value[place] = stepped.detach()[place]
            values.append(value)
        return values

    def _in_model(self, stepped: list[torch.Tensor]) -> list[torch.Tensor]:
        """The values of all weights, from those of what the optimizer steps."""
        updater = self.updater
        found = {weight: weight.detach().clone() for weight in self.weights}
        groups = updater.optimizer.param_groups if updater.optimizer else []
        originals = [each for group in groups for each in group["params"]]
        for original, value in zip(originals, stepped, strict=True):
            for weight, place in updater.pieces(original):
                found[weight] = (value if place is None else value[place].view_as(weight)).to(weight.dtype)
        return [found[weight] for weight in self.weights]

    def _tied_places(self, stepped: torch.Tensor) -> list[slice]:
        """Where the tied weights are in something that the optimizer steps."""
        return [
            slice(None) if place is None else place
            for weight, place in self.updater.pieces(stepped)
            if any(weight is tied for tied in self.tied.values())
        ]

    def _shards(self, master: torch.Tensor) -> list[torch.Tensor]:
        """The elements of a flat master that belong to each replica."""
        replicas = len(self._sums)
        sizes = [weight.numel() for weight, _ in self.updater.pieces(master)]
        places = list(torch.arange(master.numel()).split([*sizes, master.numel() - sum(sizes)]))
        if self.job.config.get("zero_optimization", {}).get("round_robin_gradients"):
            dealt = itertools.chain.from_iterable(places[:-1][first::replicas] for first in range(replicas))
            places = [*dealt, places[-1]]
        each = -(-master.numel() // (2 * replicas)) * 2
        order = torch.cat(places)
        return [order[replica * each :][:each] for replica in range(replicas)]

    def _place(self, parameter: torch.Tensor) -> int:
        [place] = [number for number, each in enumerate(self.updater.parameters) if each is parameter]
        return place

"""How a stage's accumulated gradients become an update: the arithmetic of DeepSpeed's optimizers, in the same order.

`Updater` is fp32 without ZeRO, `MasterUpdater` is DeepSpeed's BF16_Optimizer, and `ZeroUpdater` is its ZeRO stage 1.
Gradients are handed over in a list, one for each trained parameter, in `sum_dtype`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from testing import jobs
from testing.jobs import Job

__all__ = ["MasterUpdater", "Updater", "ZeroArithmetic", "ZeroUpdater", "updater_for"]


@dataclass(frozen=True, kw_only=True)
class ZeroArithmetic:
    """What ZeRO does otherwise than BF16_Optimizer.  The defaults are ZeRO's.

    Attributes:
        norm_dtype: in which the norms of the pieces are taken.
        scale_dtype: in which the gradients are multiplied by the clip factor.
        reciprocal: the factor is 1 / (norm / clip), not clip / norm.
    """

    norm_dtype: torch.dtype = torch.float64
    scale_dtype: torch.dtype = torch.float32
    reciprocal: bool = True


def updater_for(job: Job, parameters: list[nn.Parameter], replicas: int, zero: ZeroArithmetic) -> Updater:
    """The updater that DeepSpeed would choose for the job, of these parameters of a stage."""
    if job.precision != "bf16" and "zero_optimization" in job.config:
        return ZeroUpdater(job, parameters, replicas, zero)
    return (Updater if job.precision == "fp32" else MasterUpdater)(job, parameters)


class Updater:
    """Gradients and weights in fp32.

    Attributes:
        parameters: those that are trained.
        optimizer: None where nothing is trained.
        sum_dtype: of the accumulated gradients.
        wire_dtype: in which the replicas' gradients are summed.
        factors: for every update that clips, clip / norm; below 1 it scaled the gradients.
    """

    sum_dtype = wire_dtype = torch.float32

    def __init__(self, job: Job, parameters: list[nn.Parameter]) -> None:
        self.clip = job.clip
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.factors: list[float] = []
        self.optimizer, self.schedule = None, None
        groups = jobs.parameter_groups(job, self.parameters) if self.parameters else []
        self.groups = [list(group["params"]) for group in groups]
        if groups:
            self.optimizer = jobs.optimizer(job)(self.stepped(groups))
            self.schedule = jobs.schedule(job)(self.optimizer) if job.warmup else None

    def stepped(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups of what the optimizer steps."""
        return groups

    def zeros(self) -> list[torch.Tensor]:
        """Gradients that nothing has been added to."""
        return [torch.zeros_like(parameter, dtype=self.sum_dtype) for parameter in self.parameters]

    def mean(self, sums: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
        """The mean over the replicas of their gradients, added up in the dtype of the wire."""
        means = [
            sum(gradient.to(self.wire_dtype) for gradient in same).mul(1.0 / len(sums))
            for same in zip(*sums, strict=True)
        ]
        return [mean.to(self.sum_dtype) for mean in means]

    def square(self, gradients: list[torch.Tensor], counted: list[bool]) -> torch.Tensor:
        """The squared norm of the gradients that count."""
        norms = [gradient.float().norm(2.0) for gradient, counts in zip(gradients, counted, strict=True) if counts]
        return torch.stack(norms).pow(2.0).sum() if norms else torch.zeros(())

    def step(self, gradients: list[torch.Tensor], square: torch.Tensor) -> None:
        """Scale the gradients by min(1, clip / (norm + 1e-6)), and update the weights."""
        if not self.optimizer:
            return
        factor = None
        if self.clip:
            factor = self.factor(square.sqrt() + 1e-6)
            self.factors.append(factor.item())
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.parameters)):
            self.update(gradients, factor if factor is not None and factor < 1 else None)
        if self.schedule:
            self.schedule.step()

    def factor(self, norm: torch.Tensor) -> torch.Tensor:
        """clip / norm, as DeepSpeed divides it for fp32 gradients: one fp32 number by another."""
        return torch.tensor(self.clip) / norm

    def update(self, gradients: list[torch.Tensor], factor: torch.Tensor | None) -> None:
        """One step of the optimizer, on gradients that are scaled first."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient if factor is None else gradient.mul_(factor)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def pieces(self, stepped: torch.Tensor) -> list[tuple[nn.Parameter, slice | None]]:
        """The parameters that something which the optimizer steps stands for, and where they are in it."""
        return [(stepped, None)]


class MasterUpdater(Updater):
    """Parameters over fp32 master weights, one flat tensor per group, of even length, as DeepSpeed keeps them.

    Gradients of each micro-batch come in bf16 and are added up in fp32 or bf16.  The sum goes over the wire between
    replicas in `communication_data_type`, the parameters' dtype unless the config says otherwise, and is rounded to it
    even where there is one replica only.
    """

    def __init__(self, job: Job, parameters: list[nn.Parameter]) -> None:
        self.sum_dtype = _sum_dtype(job)
        named = job.config.get("communication_data_type", job.precision[:4])
        self.wire_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[named]
        self.masters: list[torch.Tensor] = []
        super().__init__(job, parameters)

    def stepped(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.masters = [
            self.flat([parameter.detach() for parameter in group["params"]]).float().requires_grad_()
            for group in groups
        ]
        return [{**group, "params": [master]} for group, master in zip(groups, self.masters, strict=True)]

    def flat(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The tensors of a group behind one another."""
        pieces = [tensor.flatten() for tensor in tensors]
        if sum(piece.numel() for piece in pieces) % 2:
            pieces.append(torch.zeros(1, dtype=pieces[0].dtype))
        return torch.cat(pieces)

    def square(self, gradients: list[torch.Tensor], counted: list[bool]) -> torch.Tensor:
        # BF16_Optimizer adds them up group by group.
        numbers = {parameter: number for number, parameter in enumerate(self.parameters)}
        order = [numbers[parameter] for group in self.groups for parameter in group]
        return super().square([gradients[number] for number in order], [counted[number] for number in order])

    def factor(self, norm: torch.Tensor) -> torch.Tensor:
        return self.clip / norm  # in PyTorch the reciprocal of the norm, times a Python number

    def update(self, gradients: list[torch.Tensor], factor: torch.Tensor | None) -> None:
        for master, gradient in zip(self.masters, self.by_group(gradients), strict=True):
            master.grad = self.scaled(gradient, factor)
        self.optimizer.step()
        for master in self.masters:
            for parameter, place in self.pieces(master):
                parameter.data.copy_(master.detach()[place].view_as(parameter))

    def by_group(self, gradients: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The flat gradient of each group."""
        numbers = {parameter: number for number, parameter in enumerate(self.parameters)}
        for group in self.groups:
            yield self.flat([gradients[numbers[parameter]] for parameter in group])

    def scaled(self, gradient: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
        """The optimizer's gradient: scaled in the dtype of the sum."""
        return (gradient if factor is None else gradient.mul_(factor)).float()

    def pieces(self, stepped: torch.Tensor) -> list[tuple[nn.Parameter, slice | None]]:
        [group] = [group for group, master in zip(self.groups, self.masters, strict=True) if master is stepped]
        ends = itertools.accumulate(parameter.numel() for parameter in group)
        return [(parameter, slice(end - parameter.numel(), end)) for parameter, end in zip(group, ends, strict=True)]


class ZeroUpdater(MasterUpdater):
    """ZeRO stage 1: gradients in the parameters' dtype, which the replicas share out, clipped in fp32.

    A norm is taken piece by piece in fp64, a piece being what one replica's partition holds of a parameter; the sum
    over a partition is rounded to fp32, and so is the sum over the partitions.  Gradients are averaged in their own
    dtype, cast to fp32, and only then multiplied by 1 / max(1, (norm + 1e-6) / clip).
    """

    def __init__(self, job: Job, parameters: list[nn.Parameter], replicas: int, arithmetic: ZeroArithmetic) -> None:
        super().__init__(job, parameters)
        self.wire_dtype = self.sum_dtype
        self.replicas, self.arithmetic = replicas, arithmetic
        self.loss_scale = job.config.get("fp16", {}).get("loss_scale", 1.0)

    def square(self, gradients: list[torch.Tensor], counted: list[bool]) -> torch.Tensor:
        numbers = {parameter: number for number, parameter in enumerate(self.parameters)}
        squares = []
        for group, gradient in zip(self.groups, self.by_group(gradients), strict=True):
            square = self._partitioned(gradient, group, [counted[numbers[parameter]] for parameter in group])
            squares.append(square)
        if len(squares) > 1:
            return torch.stack([square.sqrt() for square in squares]).norm().square()
        return squares[0] if squares else torch.zeros(())

    def _partitioned(self, flat: torch.Tensor, group: list[nn.Parameter], counted: list[bool]) -> torch.Tensor:
        used = sum(parameter.numel() for parameter in group)
        even = 2 * self.replicas
        size = -(-used // even) * even // self.replicas
        bounds = [0, *itertools.accumulate(parameter.numel() for parameter in group)]
        total = torch.zeros(())
        for start in range(0, size * self.replicas, size):
            cuts = [(max(start, low), min(start + size, high)) for low, high in itertools.pairwise(bounds)]
            norms = [
                flat[low:high].to(self.arithmetic.norm_dtype).norm()
                for (low, high), counts in zip(cuts, counted, strict=True)
                if counts and low < high
            ]
            if norms:
                total = total + torch.stack(norms).square().sum().float()
        return total

    def factor(self, norm: torch.Tensor) -> torch.Tensor:
        return 1.0 / (norm / self.clip) if self.arithmetic.reciprocal else self.clip / norm

    def scaled(self, gradient: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
        gradient = gradient.to(self.arithmetic.scale_dtype)
        return (gradient if factor is None else gradient.mul_(factor)).float().mul_(1.0 / self.loss_scale)


def _sum_dtype(job: Job) -> torch.dtype:
    if "fp16" in job.config:
        return torch.float16
    return {"fp32": torch.float32, "bf16": torch.float32, "bf16-bf16": torch.bfloat16}[job.precision]

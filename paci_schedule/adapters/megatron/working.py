"""The weights that a Megatron stage computes with, and the predictions that are written into them.

Megatron-core's optimizers step masters in fp32 where the working weights are bf16, the working weights themselves where
they are fp32, and shards of either under the distributed optimizer.  A prediction is written into the working weights,
cast as an update casts it.  The masters stay as they are; of fp32 weights a copy is kept while a prediction stands.
Each replica with a shard predicts that shard, from its own part of the gradient, and the replicas gather their
predictions as they gather the result of an update.

The parameters are predicted in pieces, so that there is never a copy of all masters, gradients or states.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from paci_schedule.predict import advance, expected_gradient, pieces
from paci_schedule.predict.copies import copied, write

__all__ = ["KNOWN", "WorkingWeights", "copied_bytes"]

KNOWN = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)
"""The optimizers whose weights can be predicted."""


class WorkingWeights:
    """The parameters of one stage, or this rank's shards of them (`predict.Weights`).

    Args:
        optimizers: of the stage, each one of `KNOWN` around one that `predict.check` lets pass.
        deferred: parameters whose gradients are applied some updates later; they are predicted from what their momentum
            expects, whatever part of a gradient is there.
        partial: parameters of whose gradients each of the stage's slices has a part until Megatron sums them.
        slices: the process group of these slices.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        deferred: Collection[torch.nn.Parameter],
        partial: Collection[torch.nn.Parameter],
        slices: dist.ProcessGroup,
    ) -> None:
        trained = [optimizer for optimizer in optimizers if not optimizer.is_stub_optimizer]
        self._wrapped = [optimizer.optimizer for optimizer in trained]
        self._owned = {each.stepped: each for optimizer in trained for each in _owned_by(optimizer)}
        self._without_master = [each for each in self._owned.values() if not each.has_master]
        sharded = [optimizer for optimizer in trained if isinstance(optimizer, DistributedOptimizer)]
        self._gathered: list[Any] = list(
            dict.fromkeys(chunk for optimizer in sharded for chunk in optimizer.model_chunks)
        )
        self._deferred, self._partial, self._slices = set(deferred), set(partial), slices
        self._is_predicted = False
        self._real: list[torch.Tensor] = []  # of those without a master, while a prediction stands

    @torch.no_grad()
    def predict(self, windows: int, scale: float, factor: torch.Tensor | None, reach: float) -> None:
        """As `Weights.predict`, by the wrapped optimizers' own step."""
        if self._is_predicted:
            write([each.working for each in self._without_master], self._real)
        else:
            self._real = copied([each.working for each in self._without_master])
        for optimizer in self._wrapped:
            for stepping, group, entries in pieces(optimizer):
                owned = {stepped: (self._owned[whole], at) for stepped, whole, at in entries}
                values = {stepped: stepped.detach().clone() for stepped in owned}
                gradients = self._parts(owned, scale, factor) if scale else {}
                for stepped, (each, _) in owned.items():
                    if not scale or each.parameter in self._deferred:
                        gradients[stepped] = expected_gradient(stepping, group, stepped, values[stepped])
                known = {stepped: gradient for stepped, gradient in gradients.items() if gradient is not None}
                advance(stepping, values, known, windows, reach)
                write([each.working[at] for each, at in owned.values()], list(values.values()))
        self._gather()
        self._is_predicted = True

    def restore(self) -> None:
        """As `Weights.restore`."""
        if not self._is_predicted:
            return
        mastered = [each for each in self._owned.values() if each.has_master]
        write([each.working for each in mastered], [each.stepped for each in mastered])
        write([each.working for each in self._without_master], self._real)
        self._gather()
        self._is_predicted, self._real = False, []

    def exchange(self) -> None:
        """A call ends with an update, so that no prediction stands between two calls."""
        assert not self._is_predicted

    def _parts(
        self, owned: Mapping[torch.Tensor, tuple[_Owned, Any]], scale: float, factor: torch.Tensor | None
    ) -> dict[torch.Tensor, torch.Tensor | None]:
        """What is there of the gradients, as the mean that stands for the whole window's, clipped; copies."""
        there = {
            stepped: total[at]
            for stepped, (each, at) in owned.items()
            if each.parameter not in self._deferred and (total := each.total()) is not None
        }
        if not there:
            return {}
        parts = torch._foreach_mul([total.float() for total in there.values()], scale)
        partial = [
            part for stepped, part in zip(there, parts, strict=True) if owned[stepped][0].parameter in self._partial
        ]
        if partial:
            flat = _flatten_dense_tensors(partial)
            dist.all_reduce(flat, group=self._slices)
            write(partial, _unflatten_dense_tensors(flat, partial))
        if factor is not None:
            torch._foreach_mul_(parts, factor)
        return dict(zip(there, parts, strict=True))

    def _gather(self) -> None:
        """Let the replicas have each other's shards, as after an update."""
        for chunk in self._gathered:
            chunk.start_param_sync(force_sync=True)


@dataclass(frozen=True)
class _Owned:
    """What this rank steps of one of the model's parameters: all of it, or its shard.

    Attributes:
        parameter: of the model.
        stepped: as the wrapped optimizer knows it.
        place: which elements of the flat parameter; None for all, in the parameter's shape.
    """

    parameter: torch.nn.Parameter
    stepped: torch.Tensor
    place: slice | None = None

    @property
    def has_master(self) -> bool:
        """Whether the optimizer steps another tensor than the working weights."""
        return self.stepped.dtype != self.parameter.dtype

    @property
    def working(self) -> torch.Tensor:
        """What forwards read; a view."""
        return self._own(self.parameter.detach())

    def total(self) -> torch.Tensor | None:
        """The sum of the gradients since the last update; a view."""
        gradient = getattr(self.parameter, "main_grad", None)  # in Megatron's DDP
        gradient = self.parameter.grad if gradient is None else gradient
        return None if gradient is None else self._own(gradient)

    def _own(self, whole: torch.Tensor) -> torch.Tensor:
        return whole if self.place is None else whole.view(-1)[self.place]


def copied_bytes(optimizers: Sequence[Any]) -> int:
    """How many bytes of weights `WorkingWeights` keeps twice while a prediction stands: of those without a master."""
    trained = [optimizer for optimizer in optimizers if not optimizer.is_stub_optimizer]
    kept = [each.working for optimizer in trained for each in _owned_by(optimizer) if not each.has_master]
    return sum(weight.numel() * weight.element_size() for weight in kept)


def _owned_by(optimizer: MegatronOptimizer) -> Iterator[_Owned]:
    if isinstance(optimizer, DistributedOptimizer):
        for parameters, shards in (
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        ):
            for parameter, shard in zip(chain(*parameters), chain(*shards), strict=True):
                place = optimizer._get_model_param_range_map(parameter)["param"]
                yield _Owned(parameter, shard, slice(place.start, place.end))
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        masters = chain(*optimizer.fp32_from_float16_groups)
        for parameter, master in zip(chain(*optimizer.float16_groups), masters, strict=True):
            yield _Owned(parameter, master)
        for parameter in chain(*optimizer.fp32_from_fp32_groups):
            yield _Owned(parameter, parameter)
    else:
        for parameter in optimizer.get_parameters():
            yield _Owned(parameter, parameter)

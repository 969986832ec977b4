"""Where DeepSpeed's optimizers with fp32 masters keep what one replica updates: its shard of every parameter group.

The parameters are views of one flat tensor for each group, and so is the shard's working part; the places of all
elements follow from that.  (DeepSpeed's `_hp_mapping` is wrong about them with `round_robin_gradients`.)  What is
accumulated between two updates lies

* under `BF16_Optimizer` in one flat tensor for the group, of which the replica's part is a view;
* under ZeRO stage 1 (`DeepSpeedZeroOptimizer`) where autograd leaves it, in the whole `.grad` of every parameter, in
  the parameter's dtype, or in `.grad_accum`, where sums have another one: in a pipeline `overlap_comm` is off, and
  buckets are filled, reduced and divided into shards only in `reduce_gradients`, at the update.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

__all__ = ["Shard", "flat_weights", "gather", "shards_of"]


@dataclass(frozen=True)
class Shard:
    """A replica's shard of a parameter group; all tensors are flat, and alike in length."""

    working: torch.Tensor
    """What forwards read, of the shard; a view of `flat_weights`."""

    master: torch.Tensor
    """The real weights, fp32."""

    part: Callable[[slice], torch.Tensor]
    """What this replica has accumulated for these elements of the shard: a fresh tensor of the master's kind."""

    deferred: list[slice]
    """The elements that belong to the parameters asked for."""


def shards_of(
    optimizer: BF16_Optimizer | DeepSpeedZeroOptimizer, deferred: Collection[torch.nn.Parameter]
) -> Iterator[Shard]:
    """This replica's shards, one for each group of the wrapped optimizer, in its order."""
    wanted = {id(parameter) for parameter in deferred}
    for parameters, working, master, part in _groups(optimizer):
        places = _places((parameter for parameter in parameters if id(parameter) in wanted), working)
        deferred_places = [
            slice(max(begin, 0), min(begin + parameter.numel(), working.numel())) for parameter, begin in places
        ]
        yield Shard(working, master, part, deferred_places)


def _groups(
    optimizer: BF16_Optimizer | DeepSpeedZeroOptimizer,
) -> Iterator[tuple[list[torch.nn.Parameter], torch.Tensor, torch.Tensor, Callable[[slice], torch.Tensor]]]:
    """By group: its parameters, and of the shard the working weights, the masters and how to come by the part."""
    if isinstance(optimizer, BF16_Optimizer):
        for parameters, partitions, master, total in zip(
            optimizer.bf16_groups,
            optimizer.bf16_partitioned_groups,
            optimizer.fp32_groups_flat_partition,
            optimizer.fp32_groups_gradient_flat_partition,
            strict=True,
        ):
            yield parameters, partitions[optimizer.dp_rank], master, _FlatPart(total)
    else:
        for parameters, partitions, master, group in zip(
            optimizer.bit16_groups,
            optimizer.parallel_partitioned_bit16_groups,
            optimizer.single_partition_of_fp32_groups,
            optimizer.real_dp_process_group,
            strict=True,
        ):
            working = partitions[dist.get_rank(group)]
            yield parameters, working, master, _ScatteredPart(optimizer, parameters, working, master)


def flat_weights(optimizer: BF16_Optimizer | DeepSpeedZeroOptimizer) -> list[torch.Tensor]:
    """All working weights, a flat tensor for each group, of which the parameters are views."""
    return optimizer.bf16_groups_flat if isinstance(optimizer, BF16_Optimizer) else optimizer.bit16_groups_flat


def gather(optimizer: BF16_Optimizer | DeepSpeedZeroOptimizer) -> None:
    """Exchange the working shards among the replicas, as after an update; a collective of the stage's replicas."""
    has_bf16 = isinstance(optimizer, BF16_Optimizer)
    all_gather_dp_groups(
        groups_flat=flat_weights(optimizer),
        partitioned_param_groups=(
            optimizer.bf16_partitioned_groups if has_bf16 else optimizer.parallel_partitioned_bit16_groups
        ),
        dp_process_group=optimizer.real_dp_process_group,
        start_alignment_factor=optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=optimizer.allgather_bucket_size,
    )


def _places(
    parameters: Iterable[torch.nn.Parameter], working: torch.Tensor
) -> Iterator[tuple[torch.nn.Parameter, int]]:
    """The parameters of which elements lie in the shard, and where their first element lies or would lie."""
    for parameter in parameters:
        begin = int(parameter.storage_offset() - working.storage_offset())
        if -parameter.numel() < begin < working.numel():
            yield parameter, begin


class _FlatPart:
    """The part in one flat tensor."""

    def __init__(self, total: torch.Tensor) -> None:
        self._total = total

    def __call__(self, at: slice) -> torch.Tensor:
        return self._total[at].to(torch.float32, copy=True)


class _ScatteredPart:
    """The part in the gradients of the parameters, of which ZeRO says where they are accumulated."""

    def __init__(
        self,
        optimizer: DeepSpeedZeroOptimizer,
        parameters: Iterable[torch.nn.Parameter],
        working: torch.Tensor,
        master: torch.Tensor,
    ) -> None:
        self._optimizer, self._master, self._places = optimizer, master, list(_places(parameters, working))

    def __call__(self, at: slice) -> torch.Tensor:
        part = torch.zeros_like(self._master[at], requires_grad=False)
        for parameter, begin in self._places:
            gradient = self._optimizer.get_gradient_for_reduction(parameter)
            first, last = max(at.start, begin), min(at.start + part.numel(), begin + parameter.numel())
            if gradient is not None and first < last:
                part[first - at.start : last - at.start] = gradient.flatten()[first - begin : last - begin]
        return part

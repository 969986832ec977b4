"""Megatron-core's sums over all stages in every update, made local to the stage.

Its optimizers reduce gradient norms over all stages.  Here they reduce them over their own stage, and the other stages'
norms come with the messages.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

from paci_schedule.adapters.megatron import groups
from paci_schedule.runtime.deferred.norms import CarriedNorms, NormGroup

__all__ = ["StageSums", "chains", "is_sharded", "optimizers", "owner_of"]

logger = logging.getLogger(__name__)

_OVER_THE_WORLD = ("get_grad_norm", "count_zeros", "has_grad_norm_group", "_get_grad_norm_for_group")
"""What a layer-wise optimizer sums over the world, whatever groups its parts have."""


def optimizers(config: Any) -> list[MegatronOptimizer]:
    """The optimizers behind a model's config, found through its grad_scale_func, chains taken apart; empty where it
    has none."""
    return [optimizer for optimizer in _all(config) if not isinstance(optimizer, ChainedOptimizer)]


def chains(config: Any) -> list[ChainedOptimizer]:
    """The chains that hold them."""
    return [optimizer for optimizer in _all(config) if isinstance(optimizer, ChainedOptimizer)]


def is_sharded(config: Any) -> bool:
    """Whether data-parallel ranks each keep a shard of the reduced gradients."""
    return any(isinstance(optimizer, DistributedOptimizer) for optimizer in optimizers(config))


@dataclass
class _Sums:
    """Where an optimizer sums over.

    Attributes:
        stage: the ranks of this stage that hold a part of its gradients.
        whole: those of all stages, which Megatron-core sums over.
        carried: what completes the stage's squared norm with those of the other stages; None to leave it as it is.
    """

    optimizer: MegatronOptimizer
    stage: dist.ProcessGroup
    whole: dist.ProcessGroup
    carried: NormGroup | None = None

    def be_over(self, group: dist.ProcessGroup) -> None:
        self.optimizer.grad_stats_parallel_group = group


class StageSums:
    """The sums of an optimizer, restricted to the stage.

    They are taken over its tensor-parallel ranks and, where the optimizer is sharded, over the shards.  A squared
    gradient norm is completed with those of the other stages.

    Args:
        config: the model's config.
        norms: of the other stages; None to leave each stage its own norm.
        warn: whether this rank says what that means for clipping.

    Attributes:
        flushing: whether the next update is one of Megatron-core's own schedule.
    """

    def __init__(self, config: Any, norms: CarriedNorms | None, warn: bool) -> None:
        found = optimizers(config)
        if not found and warn:
            logger.warning(
                "config.grad_scale_func is not a Megatron optimizer's scale_loss: if the optimizer reduces gradient "
                "norms over the pipeline, every update waits for all stages; set config.grad_scale_func = "
                "optimizer.scale_loss"
            )
        layer_wise = [chain for chain in chains(config) if isinstance(chain, LayerWiseDistributedOptimizer)]
        for chain in layer_wise:
            for name in _OVER_THE_WORLD:
                if hasattr(ChainedOptimizer, name):
                    setattr(chain, name, MethodType(getattr(ChainedOptimizer, name), chain))
        parts = {part for chain in layer_wise for part in chain.chained_optimizers}
        self._sums = [_sums(optimizer, optimizer in parts) for optimizer in found]
        if norms is not None and found:
            carried: dict[tuple[tuple[int, ...], ...], NormGroup] = {}
            for each in self._sums:
                # One group for all that sum over the same ranks: a chain then takes one norm of all their gradients.
                ranks = tuple(tuple(dist.get_process_group_ranks(group)) for group in (each.stage, each.whole))
                if ranks not in carried:
                    carried[ranks] = NormGroup(norms, each.stage, each.whole)
                each.carried = carried[ranks]
            owner = owner_of(config)
            assert owner is not None, "they were found through it"
            owner.count_zeros = self._over_plain_groups(owner.count_zeros)
        clip = max((optimizer.config.clip_grad for optimizer in found), default=0.0)
        if clip > 0 and norms is None and warn:
            logger.warning(
                "clip_grad=%g (Megatron's default is 1.0) clips each stage by the norm of its own gradients, not by "
                "the norm over all stages; the grad norm in the log is the last stage's",
                clip,
            )
        self.flush(False)

    def flush(self, flushing: bool) -> None:
        """Whether the next update is one of Megatron-core's own schedule, whose sums are over all stages."""
        self.flushing = flushing
        for each in self._sums:
            if each.carried is not None:
                each.carried.flushing = flushing
                each.be_over(each.carried)
            else:
                each.be_over(each.whole if flushing else each.stage)

    def _over_plain_groups(self, count: Callable[..., Any]) -> Callable[..., Any]:
        """`count` over plain groups, because its sums are not squared norms."""

        @functools.wraps(count)
        def counted(*args: Any, **kwargs: Any) -> Any:
            for each in self._sums:
                each.be_over(each.whole if self.flushing else each.stage)
            try:
                return count(*args, **kwargs)
            finally:
                self.flush(self.flushing)

        return counted


def _sums(optimizer: MegatronOptimizer, is_layer_wise: bool) -> _Sums:
    whole = None if is_layer_wise else optimizer.get_grad_stats_parallel_group()
    whole = whole or dist.group.WORLD
    assert whole is not None, "torch.distributed is initialised"
    return _Sums(optimizer, _part_of_stage(whole), whole)


def _part_of_stage(whole: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group of those ranks in `whole` that belong to this stage: its slices, those of its experts, or its shards.

    Megatron-core has no group for one of several instances of the distributed optimizer in a stage; its ranks make one.
    """
    ranks = set(dist.get_process_group_ranks(whole)) & set(dist.get_process_group_ranks(groups.stage()))
    for group in (groups.tensor_parallel(), groups.experts(), groups.stage()):
        if set(dist.get_process_group_ranks(group)) == ranks:
            return group
    made = dist.new_group(sorted(ranks), use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup), "this rank is one of them"
    return made


def _all(config: Any) -> Iterator[MegatronOptimizer]:
    owner = owner_of(config)
    waiting = [] if owner is None else [owner]
    while waiting:
        optimizer = waiting.pop(0)
        yield optimizer
        waiting[:0] = getattr(optimizer, "chained_optimizers", [])


def owner_of(config: Any) -> MegatronOptimizer | None:
    """The optimizer that the training loop steps, a chain or not; None where a model's config does not tell."""
    owner = getattr(config.grad_scale_func, "__self__", None)
    return owner if isinstance(owner, MegatronOptimizer) else None

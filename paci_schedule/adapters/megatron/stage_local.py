"""Megatron-core's optimizers reduce gradient norms over all stages in every update.

Here they do over their own stage; the other stages' norms come with the messages.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from paci_schedule.runtime.norms import CarriedNorms, NormGroup

__all__ = ["StageSums", "is_sharded", "optimizers", "owner_of"]

logger = logging.getLogger(__name__)


def optimizers(config: Any) -> list[MegatronOptimizer]:
    """The optimizers behind a model's config, found through its grad_scale_func; empty where it has none."""
    owner = owner_of(config)
    return [] if owner is None else list(getattr(owner, "chained_optimizers", None) or [owner])


def is_sharded(config: Any) -> bool:
    """Whether data-parallel ranks each keep a shard of the optimizer, and of the reduced gradients."""
    return any(isinstance(optimizer, DistributedOptimizer) for optimizer in optimizers(config))


class StageSums:
    """Lets sums of the optimizer be those of the stage: over its tensor-parallel ranks and, where the optimizer is
    sharded, over the shards.  A squared gradient norm is completed with those of the other stages.

    Args:
        config: the model's config.
        norms: of the other stages; None to leave each stage its own norm.
        warn: whether this rank says what that means for clipping.
    """

    def __init__(self, config: Any, norms: CarriedNorms | None, warn: bool) -> None:
        found = optimizers(config)
        if not found and warn:
            logger.warning(
                "config.grad_scale_func is not a Megatron optimizer's scale_loss: if the optimizer reduces gradient "
                "norms over the pipeline, every update waits for all stages; set config.grad_scale_func = "
                "optimizer.scale_loss"
            )
        self._groups: list[tuple[MegatronOptimizer, dist.ProcessGroup, dist.ProcessGroup]] = []
        for optimizer in found:
            whole = optimizer.get_grad_stats_parallel_group() or dist.group.WORLD
            if isinstance(optimizer, DistributedOptimizer):
                stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            else:
                stage = parallel_state.get_tensor_model_parallel_group()
            if norms is not None:
                # Of the sums over this group, the number of zeros alone is no squared norm.
                counting = owner_of(config)
                counting.count_zeros = _over(optimizer, stage, whole, counting.count_zeros)
                stage = NormGroup(norms, stage, whole)
            self._groups.append((optimizer, stage, whole))
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
        for optimizer, stage, whole in self._groups:
            if isinstance(stage, NormGroup):
                stage.flushing = flushing
                optimizer.grad_stats_parallel_group = stage
            else:
                optimizer.grad_stats_parallel_group = whole if flushing else stage


def owner_of(config: Any) -> MegatronOptimizer | None:
    """The optimizer that the training loop steps, a chain or not; None where a model's config does not tell."""
    owner = getattr(config.grad_scale_func, "__self__", None)
    return owner if isinstance(owner, MegatronOptimizer) else None


def _over(
    optimizer: MegatronOptimizer, stage: dist.ProcessGroup, whole: dist.ProcessGroup, count: Callable[..., Any]
) -> Callable[..., Any]:
    """`count`, with a plain group for the sums of `optimizer`: `whole` under a flush, otherwise `stage`."""

    @functools.wraps(count)
    def counted(*args: Any, **kwargs: Any) -> Any:
        carried = optimizer.grad_stats_parallel_group
        optimizer.grad_stats_parallel_group = whole if carried.flushing else stage
        try:
            return count(*args, **kwargs)
        finally:
            optimizer.grad_stats_parallel_group = carried

    return counted

"""Megatron-core's optimizers reduce gradient norms over all stages in every update; here, over their own stage."""

from __future__ import annotations

import logging
from typing import Any

from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

__all__ = ["make_optimizer_local", "optimizers"]

logger = logging.getLogger(__name__)


def optimizers(config: Any) -> list[MegatronOptimizer]:
    """The optimizers behind a model's config, found through its grad_scale_func; empty where it has none."""
    owner = getattr(config.grad_scale_func, "__self__", None)
    if not isinstance(owner, MegatronOptimizer):
        return []
    return list(getattr(owner, "chained_optimizers", None) or [owner])


def make_optimizer_local(config: Any, warn: bool) -> None:
    """Let gradient norms and counts be those of the stage: summed over its tensor-parallel ranks and, where the
    optimizer is sharded, over the shards.

    Args:
        config: the model's config.
        warn: whether this rank says what that means for clipping.
    """
    found = optimizers(config)
    if not found and warn:
        logger.warning(
            "config.grad_scale_func is not a Megatron optimizer's scale_loss: if the optimizer reduces gradient norms "
            "over the pipeline, every update waits for all stages; set config.grad_scale_func = optimizer.scale_loss"
        )
    for optimizer in found:
        if isinstance(optimizer, DistributedOptimizer):
            group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        else:
            group = parallel_state.get_tensor_model_parallel_group()
        optimizer.grad_stats_parallel_group = group
    clip = max((optimizer.config.clip_grad for optimizer in found), default=0.0)
    if clip > 0 and warn:
        logger.warning(
            "clip_grad=%g (Megatron's default is 1.0) clips each stage by the norm of its own gradients, not by the "
            "norm over all stages; the grad norm in the log is the last stage's",
            clip,
        )

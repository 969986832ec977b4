"""Updates that a stage leaves out because its gradient is not finite.

Megatron-core's optimizers leave out an update if the scaling of a loss has found an infinity, and look for none without
scaling.  They look for one here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from paci_schedule.adapters.megatron import groups
from paci_schedule.adapters.megatron.stage_local import StageSums, optimizers, owner_of
from paci_schedule.errors import ConfigError
from paci_schedule.runtime.deferred.norms import CarriedNorms
from paci_schedule.runtime.deferred.tied import drop_overflow
from paci_schedule.runtime.finite import may_step

__all__ = ["leave_out_nonfinite"]


def leave_out_nonfinite(
    model: Any, config: Any, stage: int, device: torch.device, tied: bool, sums: StageSums, norms: CarriedNorms | None
) -> None:
    """Let the optimizer of a stage leave out an update whose gradient is not finite on one of the stage's ranks.

    Under a flush norms are summed over all stages, so all of them leave it out.

    Args:
        model: this rank's chunk.
        config: of the model.
        stage: this rank's.
        device: of the gradients.
        tied: whether the stage holds a tied weight: its copies would part if one stage left out an update, so only
            those elements of the gradient are left out that are not finite.
        sums: of the stage's optimizer.
        norms: of all stages, which hear of an update that has none; None where each stage has its own.

    Raises:
        ConfigError: the optimizer is not found.
    """
    owner: Any = owner_of(config)
    if owner is None:
        raise ConfigError(
            "config.paci = {'on_nonfinite': 'skip'}: config.grad_scale_func is not a Megatron optimizer's scale_loss, "
            "so nobody can be told to leave out an update; set config.grad_scale_func = optimizer.scale_loss"
        )
    stock = owner.prepare_grads

    def prepare_grads() -> bool:
        if tied and not sums.flushing:
            drop_overflow(weight.main_grad for weight in model.parameters() if weight.requires_grad)
            return stock()
        found = stock()
        gradients = [each for part in optimizers(config) for each in part.get_main_grads_for_grad_norm()]
        if may_step(stage, gradients, device, dist.group.WORLD if sums.flushing else groups.stage()):
            return found
        if norms is not None:
            norms.add_own(torch.full((), torch.inf, device=device))
        return True

    owner.prepare_grads = prepare_grads

"""torchtitan's Trainer under the schedule: what it does around ``pp_schedule.step`` belongs to the schedule.

The trainer clips by a norm that it sums over the stages, and steps the optimizers itself.  Under "paci" both happen
within ``pp_schedule.step``, at each stage's own moment; where the trainer asks for them, nothing is left to do.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from paci_schedule.adapters.probing import look_up, require
from paci_schedule.adapters.torch.schedule import SchedulePaci
from paci_schedule.errors import ConfigError

__all__ = ["install"]

_HOOKS = {
    "torchtitan.train:Trainer.train": ("self",),
    "torchtitan.train:dist_utils.clip_grad_norm_": ("parameters", "max_norm", "pp_mesh"),
    "torchtitan.components.checkpoint:CheckpointManager._should_save": ("curr_step", "last_step"),
    "torchtitan.components.checkpoint:CheckpointManager.save": ("curr_step", "last_step"),
    "torchtitan.components.optimizer:OptimizersContainer.zero_grad": (),
    "torchtitan.components.lr_scheduler:LRSchedulersContainer.step": (),
}


def install() -> None:
    """Let the trainer leave updates to its schedule, in a process that has imported torchtitan's."""
    module = sys.modules.get("torchtitan.train")
    if module is None or hasattr(module.Trainer, "_paci_stock"):
        return
    require((look_up(*hook) for hook in _HOOKS.items()), "paci_schedule cannot run with this torchtitan")
    stock = module.Trainer.train

    @functools.wraps(stock)
    def train(self: Any) -> None:
        schedule = getattr(self, "pp_schedule", None)
        if not isinstance(schedule, SchedulePaci):
            stock(self)
            return
        _adopt(self, schedule, module.dist_utils)
        stock(self)
        schedule.drain()

    module.Trainer.train, module.Trainer._paci_stock = train, stock


def _adopt(trainer: Any, schedule: SchedulePaci, utilities: Any) -> None:
    """Give the schedule the trainer's optimizers, and its checkpoints the schedule's state."""
    if trainer.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"torchtitan accumulates gradients over {trainer.gradient_accumulation_steps} batches under the schedule "
            '"paci", which updates after every batch: set training.local_batch_size to the whole batch of a replica, '
            "which is training.global_batch_size / the number of replicas"
        )
    optimizers, lr_schedulers = trainer.optimizers, trainer.lr_schedulers
    schedule.set_optimizers(
        list(optimizers.optimizers), list(lr_schedulers.schedulers), trainer.job_config.training.max_norm
    )
    optimizers.step = optimizers.zero_grad = lr_schedulers.step = _do_nothing
    zero = torch.zeros((), device=trainer.device)
    utilities.clip_grad_norm_ = lambda *_, **__: zero if schedule.norm is None else schedule.norm
    checkpointer = trainer.checkpointer
    if not checkpointer.enable:
        return
    checkpointer.states["paci"] = schedule
    save = checkpointer.save

    @functools.wraps(save)
    def saved(curr_step: int, last_step: bool = False) -> None:
        if checkpointer._should_save(curr_step, last_step):
            schedule.drain()
        save(curr_step, last_step)

    checkpointer.save = saved


def _do_nothing(*_: Any, **__: Any) -> None:
    """The schedule has done it."""

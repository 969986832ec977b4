"""A Megatron-LM job: its arguments, and what its training loop does across stages in every iteration.

Nothing here imports Megatron-LM.  A programme that uses only megatron-core, or a training loop of its own, is no such
job.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from paci_schedule.adapters.megatron.background import REPLACED, watch_writers
from paci_schedule.adapters.megatron.hooks import TESTED, gone, loaded, put_back, replace, stock_of
from paci_schedule.adapters.megatron.job import Deferred, Job, as_it_is
from paci_schedule.adapters.megatron.publishing import RENAMED, Publishing, beside, folder_of, named
from paci_schedule.adapters.megatron.reported import carry
from paci_schedule.adapters.megatron.settings import JOB
from paci_schedule.adapters.refusal import reasons
from paci_schedule.runtime.deferred.reports import CarriedReports
from paci_schedule.runtime.meeting import Meetings
from paci_schedule.runtime.publication import OURS

__all__ = ["MegatronLM"]

_LOOP, _SAVING = "megatron.training.training", "megatron.training.checkpointing"
_FORGETS = "destroy_global_state"
_REBOUND = {
    _LOOP: (
        "reduce_max_stat_across_model_parallel_group",
        "logical_and_across_model_parallel_group",
        "save_checkpoint",
        "calc_params_l2_norm",
        "training_log",
        "maybe_finalize_async_save",
        _FORGETS,
    ),
    _SAVING: (*RENAMED, REPLACED),
}
"""The names in its modules that get another meaning here."""


class MegatronLM(Job):
    """A job that trains in Megatron-LM's `pretrain`."""

    @classmethod
    def running(cls) -> MegatronLM | None:
        """The job that this process trains; None outside a Megatron-LM job."""
        args = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
        return cls(args) if hasattr(args, "curr_iteration") else None  # which only its own train() sets

    @property
    def iteration(self) -> int:
        return self.args.curr_iteration

    @property
    def finished(self) -> int:
        return self.args.curr_iteration + 1

    @property
    def started(self) -> float:
        return loaded(_LOOP)._TRAIN_START_TIME

    @property
    def signal_handler(self) -> Any:
        return loaded("megatron.training.global_vars").get_signal_handler() if self.args.exit_signal_handler else None

    def reasons(self) -> Iterator[str]:
        yield from reasons(JOB, self.args)
        yield from gone(_REBOUND, "Megatron-LM", f"a version in {TESTED}")

    def keep_inside(self, carried: CarriedReports | None) -> None:
        training = loaded(_LOOP)
        training.reduce_max_stat_across_model_parallel_group = as_it_is
        training.logical_and_across_model_parallel_group = as_it_is
        if carried is not None:
            carry(training, carried)

    def keep_deferred(self, deferred: Deferred, stage: int, meetings: Meetings, timeout: timedelta) -> None:
        training = loaded(_LOOP)
        stock_save = stock_of(training, "save_checkpoint")
        publishing = Publishing(self.args, stage, meetings, timeout)

        def save_checkpoint(iteration: int, *rest: Any, **options: Any) -> Any:
            write = deferred()
            transient = bool(options.get("non_persistent_ckpt"))
            return publishing.save(iteration, transient, partial(stock_save, iteration, *rest, **options), write)

        replace(training, "save_checkpoint", save_checkpoint)
        watch_writers(self.args, stage, timeout)

    def before_restart(self, let_go: Callable[[], None]) -> None:
        training = loaded(_LOOP)
        stock = stock_of(training, _FORGETS)

        def destroy_global_state() -> None:
            let_go()
            put_back(training, _REBOUND[_LOOP])
            stock()

        replace(training, _FORGETS, destroy_global_state)

    def loaded(self) -> Path | None:
        args = self.args
        if not (args.load and args.iteration):
            return None
        chosen = named(args)
        loads = chosen is not None and chosen.name == folder_of("", args.iteration).name
        return chosen / OURS if chosen is not None and loads else beside(args.load, args.iteration)

    def writers(self) -> tuple[Any, Any]:
        variables = loaded("megatron.training.global_vars")
        return variables.get_tensorboard_writer(), variables.get_wandb_writer()

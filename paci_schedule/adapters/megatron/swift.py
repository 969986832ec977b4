"""An ms-swift job: its trainer, and what its training loop does across stages in every iteration.

Nothing here imports ms-swift.  The state of the job is its trainer's, whose `train_step` calls the schedule; it is
found there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from paci_schedule.adapters.megatron.alongside import save_alongside
from paci_schedule.adapters.megatron.averages import carry_averages
from paci_schedule.adapters.megatron.callers import calling, locals_of
from paci_schedule.adapters.megatron.hooks import gone, loaded
from paci_schedule.adapters.megatron.job import Deferred, Job, as_it_is
from paci_schedule.adapters.megatron.publishing import folder_of
from paci_schedule.adapters.megatron.renamed import Renamed
from paci_schedule.adapters.megatron.settings import JOB, flag
from paci_schedule.adapters.refusal import Refusal, reasons
from paci_schedule.runtime.deferred.reports import CarriedReports
from paci_schedule.runtime.meeting import Meetings
from paci_schedule.runtime.publication import OURS

__all__ = ["Swift", "untried"]

_LOOP, _TRAINER, _LOG = (
    "swift.megatron.trainers.base",
    "swift.megatron.trainers.trainer",
    "swift.megatron.callbacks.print",
)
_LOOPS = ("swift.megatron", "swift.ray")
_MAXIMUM = "reduce_max_stat_across_model_parallel_group"
_REBOUND = {_LOOP: (_MAXIMUM, "logical_and_across_model_parallel_group"), _LOG: (_MAXIMUM,)}
"""The names in its modules that get another meaning here."""

_ARGUMENTS = (
    flag("rlhf_type", "--rlhf_type", "not tried yet: the data of some iterations are made from their weights"),
    flag("task_type", "--task_type", "not tried yet; use causal_lm", lambda value: value in (None, "causal_lm")),
    flag("tuner_type", "--tuner_type", "not tried yet: a stage may have nothing to train; use full", "full".__eq__),
    flag("freeze_parameters", "--freeze_parameters", "not tried yet: a stage may have nothing to train; leave it out"),
    flag("freeze_parameters_regex", "--freeze_parameters_regex", "as --freeze_parameters; leave it out"),
    flag("is_multimodal", "a multimodal --model", "not tried yet: only the first stage has the other modules"),
    Refusal(
        lambda args: args.streaming and args.num_train_epochs,
        "--streaming true with --num_train_epochs {value!r}",
        "the end of training is known when the data end, and PACI reads ahead; use --train_iters",
    ),
    flag(
        "async_save", "--async_save", "not tried yet: who waits for a writer that is gone would not say so; use false"
    ),
    flag(
        "router_replay_mode",
        "--router_replay_mode",
        "what is replayed is forgotten after each update, with micro-batches in flight; use disabled",
        lambda value: value in (None, "disabled"),
    ),
    flag(
        "bridge_backend",
        "--bridge_backend",
        "not tried yet; use mcore-bridge",
        lambda value: value in (None, "mcore-bridge"),
    ),
    flag("sequence_packing_scheduler", "--sequence_packing_scheduler", "not tried yet; leave it out"),
    flag("mtp_num_layers", "--mtp_num_layers", "not tried yet; leave it out"),
)

_OTHERS = {
    "curr_iteration": "iteration",
    "load": "mcore_model",
    "num_experts": "num_moe_experts",
    "save": "output_dir",
    "save_interval": "save_steps",
    "tensorboard_log_interval": "logging_steps",
}
"""The names of Megatron-LM's arguments that are others in ms-swift."""

_ABSENT = {"exit_duration_in_mins": None, "exit_interval": None, "exit_signal_handler": False, "log_params_norm": False}
"""The arguments that ms-swift has not, with what that means."""


class Swift(Job):
    """A job that trains in the `train` of ms-swift's MegatronTrainer.

    Args:
        trainer: of the job.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(Renamed([trainer.state, trainer.args, trainer.config], _OTHERS, _ABSENT))
        self._trainer = trainer

    @classmethod
    def running(cls) -> Swift | None:
        """The job whose training loop calls; None outside of one."""
        found = locals_of(_LOOP, "BaseMegatronTrainer.train_step")
        return None if found is None else cls(found["self"])

    @property
    def iteration(self) -> int:
        return self._trainer.state.iteration

    @property
    def tokens(self) -> int | None:
        return None

    def reasons(self) -> Iterator[str]:
        yield from reasons(JOB, self.args)
        yield from reasons(_ARGUMENTS, self.args)
        yield from gone(_REBOUND, "ms-swift", "version 4.6")
        kind = type(self._trainer)
        if not any(f"{each.__module__}.{each.__name__}" == f"{_TRAINER}.MegatronTrainer" for each in kind.__mro__):
            yield f"the trainer {kind.__module__}.{kind.__name__}: not tried yet; use megatron pt or megatron sft"

    def worded(self, reason: str) -> str:
        return re.sub(r"--[a-z][a-z0-9-]*", lambda found: "--" + found[0][2:].replace("-", "_"), reason)

    def keep_inside(self, carried: CarriedReports | None) -> None:
        for module, names in _REBOUND.items():
            for name in names:
                setattr(loaded(module), name, as_it_is)
        if carried is not None:
            carry_averages(self._trainer, carried)

    def keep_deferred(self, deferred: Deferred, stage: int, meetings: Meetings, timeout: timedelta) -> None:
        save_alongside(self._trainer, "save_checkpoint", self._folder, self.args, deferred, stage, timeout)

    def before_restart(self, let_go: Callable[[], None]) -> None:
        """Nothing: ms-swift has no such restart."""

    def loaded(self) -> Path | None:
        start = self._trainer._start_iteration
        return folder_of(self.args.load, start) / OURS if self.args.load and start else None

    def writers(self) -> tuple[Any, Any]:
        kinds = {type(each).__name__: each for each in self._trainer.callbacks}
        board, wandb = kinds.get("TensorboardCallback"), kinds.get("WandbCallback")
        return getattr(board, "writer", None), getattr(wandb, "writer", None)

    def _folder(self) -> Path:
        """Of the checkpoint that its trainer saves now."""
        return folder_of(Path(self.args.save, f"checkpoint-{self.iteration}"), self.iteration)


def untried() -> Iterator[str]:
    """Why a training loop of ms-swift's that calls, and is not its MegatronTrainer's, cannot run under PACI."""
    if loop := calling(*_LOOPS):
        yield f"{loop}: not tried yet; it may sum over all stages in every iteration.  Use megatron pt or megatron sft"

"""A Megatron-Bridge job: its config, and what its training loop does across stages in every iteration.

Nothing here imports Megatron-Bridge.  Its loop keeps the state of the job in no global: it is a local variable of
`train`, which calls the schedule, and is found there.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import Any

from paci_schedule.adapters.megatron.alongside import save_alongside
from paci_schedule.adapters.megatron.callers import calling, locals_of
from paci_schedule.adapters.megatron.hooks import gone, loaded
from paci_schedule.adapters.megatron.job import Deferred, Job, as_it_is
from paci_schedule.adapters.megatron.publishing import folder_of
from paci_schedule.adapters.megatron.renamed import Renamed
from paci_schedule.adapters.megatron.reported import carry
from paci_schedule.adapters.megatron.settings import JOB
from paci_schedule.adapters.refusal import Refusal, reasons
from paci_schedule.runtime.deferred.reports import CarriedReports
from paci_schedule.runtime.meeting import Meetings
from paci_schedule.runtime.publication import OURS

__all__ = ["Bridge", "untried"]

_TRAIN, _UTILITIES = "megatron.bridge.training.train", "megatron.bridge.training.utils.train_utils"
_LOCALS = ("global_state", "checkpoint_manager", "start_iteration")  # of its train()
_LOOPS = (_TRAIN, "megatron.bridge.training.train_megatron_mimo")
_REDUCTIONS = (
    "reduce_max_stat_across_model_parallel_group",
    "logical_and_across_model_parallel_group",
    "reduce_max_memory_across_pp_group",
)
_REBOUND = {
    _TRAIN: (*_REDUCTIONS[:2], "calc_params_l2_norm", "training_log"),
    _UTILITIES: (*_REDUCTIONS, "get_pg_collection"),
}
"""The names in its modules that get another meaning here."""


def _key(name: str, why: str, allowed: Callable[[Any], bool] = operator.not_) -> Refusal:
    """A key of its config that may only be off, or have a value that is `allowed`."""
    return Refusal(lambda config: reduce(_part, name.split("."), config), f"{name}={{value!r}}", why, allowed)


def _part(config: Any, name: str) -> Any:
    return getattr(config, name, None)


_CONFIG = (
    _key(
        "dataset.dataloader_type",
        "it makes an iterator for each batch, and PACI reads ahead; use 'single' or 'cyclic'",
        lambda value: value != "batch",
    ),
    _key("peft", "not tried yet: a stage may have nothing to train; train all weights"),
    _key("inprocess_restart.enabled", "not tried yet with this loop; let torchrun start the job again"),
    _key("ft.enable_ft_package", "not tried yet; leave it off"),
    _key("nvrx_straggler.enabled", "each rank may end the job in an iteration of its own; leave it off"),
    _key("straggler.log_straggler", "not tried yet: it waits for all ranks; leave it off"),
    _key("tensor_inspect.enabled", "not tried yet; leave it off"),
    _key("dist.use_decentralized_pg", "not tried yet: its process groups are not parallel_state's; leave it off"),
    _key("dist.use_torch_fsdp2", "it frees weights that micro-batches in flight need; use DDP"),
    _key("model.dist_train.use_dist_train", "not tried yet: modules on other ranks have another communicator"),
    _key("model.moe_expert_rank_capacity_factor", "an overflow runs an iteration again, with micro-batches in flight"),
    _key("train.train_sync_interval", "the host would wait for the device, and so for messages; leave it out"),
    _key("checkpoint.async_save", "not tried yet: who waits for a writer that is gone would not say so; leave it off"),
    _key("checkpoint.custom_manager_class", "only Bridge's own checkpoints hold what PACI defers; leave it out"),
    _key("checkpoint.ckpt_format", "not tried yet; use 'torch_dist'", lambda value: value in (None, "torch_dist")),
    _key("checkpoint.non_persistent_ckpt_type", "not tried yet; use 'global'", lambda value: value in (None, "global")),
)


class Bridge(Job):
    """A job that trains in Megatron-Bridge's `pretrain` or `finetune`.

    Args:
        state: its GlobalState.
        manager: its CheckpointManager.
        start: iterations that it had done when its training loop began.
    """

    def __init__(self, state: Any, manager: Any, start: int) -> None:
        super().__init__(_settings(state))
        self._state, self._manager, self._start = state, manager, start

    @classmethod
    def running(cls) -> Bridge | None:
        """The job whose training loop calls; None outside of one."""
        found = locals_of(_TRAIN, "train")
        if found is None:
            return None
        _be_heard()
        return cls(*(found[name] for name in _LOCALS))

    @property
    def iteration(self) -> int:
        return self._state.train_state.step

    @property
    def started(self) -> float:
        return self._state.start_time

    @property
    def signal_handler(self) -> Any:
        return self._state.signal_handler if self.args.exit_signal_handler else None

    def reasons(self) -> Iterator[str]:
        yield from reasons(JOB, self.args)
        yield from reasons(_CONFIG, self._state.cfg)
        yield from gone(_REBOUND, "Megatron-Bridge", "version 0.7")

    def keep_inside(self, carried: CarriedReports | None) -> None:
        train, utilities = loaded(_TRAIN), loaded(_UTILITIES)
        for name in _REDUCTIONS:
            for module in (train, utilities):
                setattr(module, name, as_it_is)
        if carried is not None:
            carry(train, carried, utilities)

    def keep_deferred(self, deferred: Deferred, stage: int, meetings: Meetings, timeout: timedelta) -> None:
        save_alongside(self._manager, "save", self._folder, self.args, deferred, stage, timeout)

    def before_restart(self, let_go: Callable[[], None]) -> None:
        """Nothing: such a restart is refused."""

    def loaded(self) -> Path | None:
        if not (self.args.load and self._start):  # it may have skipped iterations since
            return None
        roots = [Path(self.args.load), *self._transient_folders()]
        # Bridge also takes the folder of one checkpoint.
        folders = [folder / OURS for folder in (*(folder_of(root, self._start) for root in roots), roots[0])]
        return next((folder for folder in folders if folder.is_dir()), folders[0])

    def writers(self) -> tuple[Any, Any]:
        return self._state.tensorboard_logger, self._state.wandb_logger

    def _folder(self, context: Any, *_: Any, **__: Any) -> Path:
        """Of the checkpoint that its manager saves now."""
        root = self._transient_folders()[0] if context.non_persistent_ckpt else Path(self.args.save)
        return folder_of(root, self.iteration)

    def _transient_folders(self) -> list[Path]:
        """Where non-persistent checkpoints are saved, and where else they may have been loaded from."""
        args = self.args
        if args.non_persistent_global_ckpt_dir:
            return [Path(args.non_persistent_global_ckpt_dir)]
        return [Path(root, "non_persistent") for root in (args.save, args.load) if root]


_PARTS = ("train", "checkpoint", "logger", "rerun_state_machine", "model", "optimizer")
_OTHERS = {"curr_iteration": "step", "iteration": "step", "num_experts": "num_moe_experts"}
"""The names of Megatron-LM's arguments that are others in Megatron-Bridge."""


def _settings(state: Any) -> Renamed:
    """Most have the same name, in one of the parts of the config."""
    parts = [state.train_state, *(getattr(state.cfg, name) for name in _PARTS)]
    transformer = getattr(state.cfg.model, "transformer", None)
    return Renamed([*parts, transformer] if transformer else parts, _OTHERS, {})


def untried() -> Iterator[str]:
    """Why a training loop of Megatron-Bridge's that calls, and is not its `train`, cannot run under PACI."""
    if loop := calling(*_LOOPS):
        yield (
            f"{loop}: not tried yet; it sums over all stages in every iteration.  Train with Megatron-Bridge's "
            "pretrain or finetune, or with a loop of your own, whose ends config.paci = {'train_iters': n, "
            "'drain_interval': n} plans"
        )


def _be_heard() -> None:
    """Let our warnings through: Bridge drops those of all loggers (logger.filter_warnings), and ours say what a run has
    lost."""
    for logger in map(logging.getLogger, list(logging.root.manager.loggerDict)):
        if logger.name.startswith("paci_schedule"):
            logger.filters = [each for each in logger.filters if getattr(each, "__name__", "") != "warning_filter"]

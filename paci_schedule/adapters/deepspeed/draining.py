"""What DeepSpeed's engine can do only where the pipe is empty: here it drains the pipe first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineModule

from paci_schedule.adapters.deepspeed.evaluating import timed_messages
from paci_schedule.adapters.deepspeed.prediction import check_spec
from paci_schedule.adapters.deepspeed.report import Reporter
from paci_schedule.adapters.deepspeed.saving import PublishingEngine, agree, find, node_of
from paci_schedule.adapters.deepspeed.stage_local import StageLocalEngine
from paci_schedule.adapters.deepspeed.ties import Ties
from paci_schedule.adapters.ending import Ending
from paci_schedule.predict import Prediction
from paci_schedule.runtime.assembly import Assembly
from paci_schedule.runtime.deferred.state import DeferredState
from paci_schedule.runtime.meeting import Meetings
from paci_schedule.runtime.publication import unfinished
from paci_schedule.runtime.stage import StageRunner
from paci_schedule.runtime.waiting import together

__all__ = ["DrainingEngine"]

logger = logging.getLogger(__name__)

_PATIENCE = 3  # batches in a row

_DEFERRED = "paci_schedule"  # the key of our part in a checkpoint's client state


class DrainingEngine(StageLocalEngine):
    """Evaluation, checkpoints and changes of the batch, each after a `drain`."""

    _assembly: Assembly
    _deferred: DeferredState
    _meetings: Meetings
    _prediction: Prediction | None
    _reporter: Reporter | None
    _runner: StageRunner
    _ties: Ties
    _timeout: timedelta

    _drained_for: str | None = None
    """The method that has drained a pipe that was not empty since the last batch; None for none."""

    _drained_batches = 0
    """The number of batches up to now, without a gap, before which a method drained the pipe."""

    _ending: Ending | None = None
    """None until the engine has its runner."""

    _newest_losses: torch.Tensor | None = None
    """float32[n]: the loss that `train_batch` returned last, and the additional losses; None before the first."""

    def drain(self) -> torch.Tensor:
        """Finish the outstanding backwards; every rank calls it."""
        raise NotImplementedError

    def report(self, waits: bool = True) -> None:
        """Print the newest update that is to be printed, and tell the monitor."""
        raise NotImplementedError

    @contextmanager
    def drained(self) -> Iterator[PipelineModule]:
        """The module after a `drain`: while the pipe is empty, the parameters of all stages have the same version.

        Every rank enters it: ``with engine.drained() as module: save(module.state_dict())``.
        """
        self.drain()
        yield self.module

    def _accounted(self) -> AbstractContextManager[None]:
        """An error that ends what runs inside leaves this rank's position, where runs are recorded."""
        return self._assembly.accounted()

    def _empty(self) -> None:
        """Finish the outstanding backwards; their losses belong to those that the next call returns."""
        raise NotImplementedError

    def _mean_over_replicas(self, losses: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _waiting_for_replicas(self, doing: str) -> AbstractContextManager[None]:
        raise NotImplementedError

    def eval_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, after a `drain`."""
        self._drain_for("eval_batch")
        self.total_loss = self.total_additional_losses = None  # an evaluation without loss would add its outputs
        with self._accounted():
            self._meetings.gather("evaluated")
            messages = timed_messages(self.grid, self.device, self._timeout)
            with together(self.stage_id, "evaluated", self._timeout), messages:
                return super().eval_batch(*args, **kwargs)

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Literal[True]:
        """As DeepSpeed's, after a `drain`, with the stage's deferred state (`runtime.deferred`).

        The checkpoint is complete under its tag, or not there; ``latest`` names it only then.

        Raises:
            CheckpointError: on every rank, if one could not write its files; the checkpoint before is untouched.
            LinkError: a rank did not come in time.
        """
        self._drain_for("save_checkpoint")
        self._average_pending_sums()
        if self._runner.untold:
            self._runner.untold = list(self._mean_over_replicas(torch.stack(self._runner.untold)))
        untold = [losses.tolist() for losses in self._runner.untold]
        losses = None if self._newest_losses is None else self._newest_losses.tolist()
        state = {**(client_state or {}), _DEFERRED: {**self._deferred.state(), "losses": losses, "untold": untold}}
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        stock = self.checkpoint_engine
        publishing = PublishingEngine(
            stock,
            self._meetings,
            Path(save_dir, tag),
            self.global_steps,
            publishes=self._keeps_folder(),
            node=node_of(self.use_node_local_storage()),
            latest=Path(save_dir, "latest") if save_latest and self.global_rank == 0 else None,
        )
        self.checkpoint_engine = publishing
        try:
            with self._accounted():
                publishing.begin()
                with together(self.stage_id, "saved a checkpoint", self._timeout):
                    return super().save_checkpoint(save_dir, unfinished(tag), state, False, exclude_frozen_parameters)
        finally:
            self.checkpoint_engine = stock

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """As DeepSpeed's, after a `drain`.

        The deferred state belongs to the optimizer's states: it is loaded only where they are.

        Raises:
            CheckpointError: on every rank: files are missing or short, or the stages' parts are of different updates.
            LinkError: a rank did not come in time.
        """
        self._drain_for("load_checkpoint")
        if not self.load_universal_checkpoint():
            tag = find(load_dir, tag, self._meetings, self._keeps_folder())
        path, client_state, failed = None, None, None
        try:
            with together(self.stage_id, "loaded a checkpoint", self._timeout):
                path, client_state = super().load_checkpoint(
                    load_dir,
                    tag,
                    load_module_strict,
                    load_optimizer_states,
                    load_lr_scheduler_states,
                    load_module_only,
                    custom_load_fn,
                )
        except Exception as error:  # whatever it is, the other ranks shall hear of it
            failed = error
        agree(self._meetings, path, self.global_steps, failed)
        deferred = (client_state or {}).pop(_DEFERRED, {"norms": [], "tied": {}})
        if path is not None and load_optimizer_states and not load_module_only:
            self._runner.untold = [torch.tensor(losses, device=self.device) for losses in deferred.get("untold", [])]
            losses = deferred.get("losses")
            self._newest_losses = None if losses is None else torch.tensor(losses, device=self.device)
            dropped = self._deferred.load_state(deferred)
            if dropped and self.grid.get_data_parallel_id() == 0:
                logger.warning("%s: pending gradient sums dropped, no such tie here: %s", path, "; ".join(dropped))
        if self._reporter is not None:
            self._reporter.begin(self.global_steps, self.global_samples)
        return path, client_state

    def _keeps_folder(self) -> bool:
        """Whether this rank looks after the folder of a checkpoint: one of the job does, or one of each node."""
        return (self.local_rank if self.use_node_local_storage() else self.global_rank) == 0

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, after a `drain`."""
        self._drain_for("save_16bit_model")
        return super().save_16bit_model(*args, **kwargs)

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """As DeepSpeed's, after a `drain`: the number of micro-batches to an update changes; nothing is done where not.

        Raises:
            UnsupportedError: predictions cannot go on with so few.
        """
        if train_batch_size == self.train_batch_size():  # a training loop may say so before every batch
            return
        self._drain_for("set_train_batch_size")
        accumulation = train_batch_size // (self.train_micro_batch_size_per_gpu() * self.dp_world_size)
        spec = replace(self._runner.spec, accumulation=max(1, accumulation))
        if self._prediction is not None:
            check_spec(self, spec)
        super().set_train_batch_size(train_batch_size)
        self._runner.respec(spec)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """As DeepSpeed's, after a `drain`: the shapes of the messages change; nothing is done where not."""
        if micro_batch_size == self.train_micro_batch_size_per_gpu():
            return
        self._drain_for("set_train_micro_batch_size")
        super().set_train_micro_batch_size(micro_batch_size)
        self.reset_activation_shape()

    def reset_activation_shape(self) -> None:
        """As DeepSpeed's; not needed where the shapes of what stages send follow from those of the inputs.

        Where the pipe is empty, shapes that stages have learnt are forgotten; else nothing happens: no drain.
        """
        super().reset_activation_shape()
        if not self._runner.admitted:
            self._shape_numbers.forget()

    def destroy(self) -> None:
        """As DeepSpeed's, after a `drain`; it does not drain while an exception propagates."""
        if self._ending is not None:
            self._ending.destroyed(self)
        super().destroy()

    def _drain_for(self, method: str) -> None:
        """Drain the pipe for the method with this name."""
        if self._runner.admitted:
            self._drained_for = method
        self._empty()

    def _note_batch(self) -> None:
        """Warn of a training loop in which a method drains the pipe before every batch; called before each of them."""
        method, self._drained_for = self._drained_for, None
        self._drained_batches = self._drained_batches + 1 if method else 0
        if self._drained_batches == _PATIENCE and self.global_rank == 0:
            logger.warning(
                "engine.%s() has emptied the pipe before each of the last %d batches, so the stages wait for each "
                "other as under 1F1B: call it only when there is something to change, evaluate or save",
                method,
                _PATIENCE,
            )

    def _average_pending_sums(self) -> None:
        """Make the pending sums of tied gradients the same on all replicas, of which one writes the checkpoint."""
        for total in self._ties.pending_sums(self._runner.at):
            if self.is_data_parallel:
                total.div_(self.dp_world_size)
                with self._waiting_for_replicas("averaged pending sums"):
                    dist.all_reduce(total, group=self.grid.get_data_parallel_group())

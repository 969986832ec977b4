"""DeepSpeed's PipelineEngine, executing PACI's stream instead of a flushed batch.

What a micro-batch's forward and backward and a stage's update *are* stays DeepSpeed's (`_exec_forward_pass`,
`_exec_backward_pass`, `_exec_reduce_grads`, `_exec_optimizer_step` and what they call).  When they run, and what is
sent in between, comes from the core through the StageRunner.  What DeepSpeed does across stages in every batch is local
or deferred here: gradient norms and overflow flags are the stage's own (`stage_local`), and the loss comes upstream
with the gradients.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.module import PipelineModule

from paci_schedule.adapters.choice import check_choice
from paci_schedule.adapters.deepspeed.compute import EngineCompute
from paci_schedule.adapters.deepspeed.device import take_device
from paci_schedule.adapters.deepspeed.diagnostics import switch_off_diagnostics
from paci_schedule.adapters.deepspeed.draining import DrainingEngine
from paci_schedule.adapters.deepspeed.experts import make_expert_groups
from paci_schedule.adapters.deepspeed.options import PaciOptions, read_schedule, settings
from paci_schedule.adapters.deepspeed.prediction import build_prediction, copied_bytes, note_update
from paci_schedule.adapters.deepspeed.refusals import check_supported, refused
from paci_schedule.adapters.deepspeed.report import Reporter, Update
from paci_schedule.adapters.deepspeed.split import why_not_split
from paci_schedule.adapters.deepspeed.stage_local import LEAST_SQUARE, StageMpu
from paci_schedule.adapters.deepspeed.ties import Ties
from paci_schedule.adapters.ending import Ending
from paci_schedule.adapters.refusal import refuse_together
from paci_schedule.adapters.start_line import say, start_line
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError, DataEndedError
from paci_schedule.runtime.assembly import Assembly
from paci_schedule.runtime.deferred.norms import NormGroup
from paci_schedule.runtime.host_copy import HostCopy
from paci_schedule.runtime.meeting import Meetings, require_alike
from paci_schedule.runtime.stopwatch import DATA
from paci_schedule.runtime.waiting import shorten_timeout, together, waiting

__all__ = ["PaciPipelineEngine"]


class PaciPipelineEngine(DrainingEngine):
    """A pipeline engine that runs PACI, whose stages never flush between batches, or a schedule that flushes.

    ``deepspeed.initialize`` constructs it when the config's ``"pipeline_schedule"`` is not DeepSpeed's own, "1f1b".  It
    is used like DeepSpeed's; what is new is `drain`, `pipeline_stats` and `set_pipeline_schedule`.

    `get_global_grad_norm` is the norm that this stage's latest update, number `global_steps`, was clipped by: its own
    at that update, other stages' of the updates that `runtime.deferred.norms` says.

    Raises:
        ConfigError: an option that the rules do not allow.
        UnsupportedError: a feature that PACI does not run with.
        LinkError: a neighbouring stage or a replica did not answer within ``"paci": {"timeout": seconds}``.
    """

    def __init__(
        self, has_bool_tensors: bool = False, *args: Any, config_class: DeepSpeedConfig, **kwargs: Any
    ) -> None:
        self._options = options = PaciOptions.read(config_class._param_dict)
        self._schedule = read_schedule(config_class._param_dict)
        self._timeout = timeout = timedelta(seconds=options.timeout)
        module: PipelineModule = kwargs["model"]
        device = take_device(kwargs.get("args"))
        grid: Any = module.mpu()  # Any for the same reason as in StageMpu
        stage = grid.get_stage_id()
        for group in (
            grid.get_data_parallel_group(),
            grid.get_slice_parallel_group(),
            grid.get_model_parallel_group(),
            grid.get_pipe_parallel_group(),
        ):
            shorten_timeout(group, timeout)
        self._meetings = Meetings(stage, timeout)
        alike = settings(config_class, options, self._schedule, module)
        require_alike(self._meetings.gather("began to construct its engine", alike))
        with together(stage, "constructed its engine", timeout):
            check_supported(self._schedule, config_class, options, module, type(self))
            make_expert_groups(config_class, module)
            switch_off_diagnostics(config_class, grid.get_pipe_parallel_world_size(), warns=grid.get_global_rank() == 0)
            spec = PipelineSpec(
                stages=grid.get_pipe_parallel_world_size(),
                accumulation=config_class.gradient_accumulation_steps,
                extra_in_flight=options.extra_in_flight,
            )
            self._assembly = Assembly(
                spec,
                grid.get_stage_id(),
                grid.get_pipe_parallel_group(),
                device,
                carries_norms=config_class.gradient_clipping > 0 and options.clip == "global" and spec.stages > 1,
                shares_weights=bool(module.tied_comms),
                timeout=timeout,
                early_receives=options.early_receives,
                record=options.record,
                replica=grid.get_data_parallel_id(),
            )
            self._norm_group = None
            if self._assembly.norms is not None:
                slices, stages = grid.get_slice_parallel_group(), grid.get_model_parallel_group()
                self._norm_group = NormGroup(self._assembly.norms, slices, stages, LEAST_SQUARE)
            stage_mpu = StageMpu(grid, self._norm_group)
            skips = options.on_nonfinite == "skip"
            super().__init__(
                has_bool_tensors, *args, config_class=config_class, stage_mpu=stage_mpu, skips=skips, **kwargs
            )
            self._check_schedule(self._schedule, spec)
            self._reporter = (
                Reporter(self.monitor, self.stage_figures, self.steps_per_print(), writes=self.global_rank == 0)
                if self.is_first_stage()
                else None
            )
            self._stage_ranks = grid.topology().filter_match(pipe=self.stage_id)
            self._ties = Ties(self, spec, timeout)
            gathering = partial(self._waiting_for_replicas, "gathered predicted weights")
            self._prediction = build_prediction(self, options, spec, self._ties.copies(), gathering)
            self._assembly.connect(
                EngineCompute(self),
                schedule(self._schedule),
                self.grid.topology().get_axis_comm_lists("pipe"),
                self._ties.gradients,
                [self._ties.gradients[name].stages for name in self._ties.across],
                self._prediction,
                watched=module if options.on_nonfinite == "raise" else None,
                spike=options.spike,
                replicas=grid.get_data_parallel_group(),
            )
            self._deferred = self._assembly.deferred
            self._runner = self._assembly.runner
            clip, copied = config_class.gradient_clipping, copied_bytes(self, options, spec)
            chosen = schedule(self._schedule)
            say(start_line(chosen, spec, options, framework="DeepSpeed", clip=clip, copied_bytes=copied))
            self._ending = Ending(self, self.global_rank == 0, timeout, "engine.drain() or engine.destroy()")

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        """Take in one batch: `gradient_accumulation_steps` micro-batches from `data_iter`.

        On return, d_s = P-1-s backwards of stage s are outstanding; they are done in the next call or by `drain`.

        Returns:
            float32[], on the device, without waiting for it: the mean loss over the micro-batches that this stage
            *finished* in this call, averaged over the data-parallel replicas.  That is this batch's loss at the last
            stage, and d_s micro-batches late at stage s.  A drain by another method than `drain` returns no losses, so
            what it has finished counts here.  Where a stage has finished none, as may be right after the pipe was empty
            if a <= d_s, it is what was returned last; and in the first call of all the last stage's loss of this batch,
            which the stages wait for.

        Raises:
            ConfigError: `data_iter` is no iterator, or there is none; raised before anything is run.
            DataEndedError: the iterator ended before a whole batch.  The pipe has been drained; save and stop.
            LinkError: a neighbouring stage or a replica did not answer in time.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() requires gradients enabled. Use eval_batch() instead.")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        if self.data_iterator is None and self.batch_fn is None and (self.is_first_stage() or self.is_last_stage()):
            raise ConfigError(
                "train_batch() without an iterator: the engine has no training data; call train_batch(iterator) with "
                "one iterator for all batches, or give deepspeed.initialize(training_data=...) a data set"
            )
        self._note_batch()
        self._assembly.stopwatch.start()
        self._choose_schedule()
        source = self.data_iterator
        with self._accounted():
            try:
                self._read_batch(source)
                self._assembly.stopwatch.lap(DATA)
                self.module.train()
                self._compute_loss = True  # an evaluation may have done without
                self.fwd_outputs, self.total_loss, self.total_additional_losses = [], None, None
                losses = self._runner.train_batch()
            finally:
                self.data_iterator, self._read_ahead = source, None
                if self._ending is not None:
                    self._ending.keep(self)
            if self._newest_losses is None:
                losses = self._first_losses(losses)
            return self._aggregate(losses)

    def set_dataiterator(self, iterator: Iterator[Any] | None) -> None:
        """As DeepSpeed's, for training and evaluation.

        Raises:
            ConfigError: an iterable that is no iterator, such as a DataLoader; on every rank that is given one.
        """
        if iterator is not None and not hasattr(iterator, "__next__"):
            raise ConfigError(
                f"data_iter={type(iterator).__name__}: has no __next__, so every batch would be its first; make one "
                "iterator before the loop, iter(loader), or deepspeed.utils.RepeatingLoader(loader) for endless data"
            )
        super().set_dataiterator(iterator)

    def set_pipeline_schedule(self, schedule: str) -> None:
        """Go on with another schedule, after a `drain`; call it on every rank.

        Args:
            schedule: "paci", or one that flushes after every batch: "1f1b", which computes what DeepSpeed's own engine
                computes, "gpipe" or "zb-h1".

        Raises:
            ConfigError: an unknown name, or a schedule that does not exist for this job's options.
            UnsupportedError: the schedule cannot run, or not this job.
        """
        self._check_schedule(check_choice(schedule, f"schedule={schedule!r}"), self._runner.spec)
        self._schedule = schedule
        self._drain_for("set_pipeline_schedule")

    def drain(self) -> torch.Tensor:
        """Finish the outstanding backwards; call it on every rank.

        Afterwards the pipe is empty and every stage has the same version.

        Returns:
            float32[]: the mean loss over the micro-batches that no call has told of, as in `train_batch`; NaN if the
            engine has not been trained.
        """
        self._empty()
        return self._aggregate(self._runner.take_losses())

    def pipeline_stats(self) -> dict[str, Any]:
        """What this stage has done, counted as it happened.

        Returns:
            stage, stages, accumulation: where it stands in which pipeline;
            version: updates applied;
            forwards, backwards: micro-batches done since construction;
            in_flight, peak_in_flight: micro-batches between their forward and backward, now and at most;
            max_drift, drift_bound, drift_histogram: in updates; micro-batches for each drift;
            predictions: of weights, for stale forwards;
            compute_seconds, wait_seconds: what the stage computed and waited since the last call to this (on CUDA: ops
            that the device has finished).
        """
        return {**self._runner.stats(), "version": self.global_steps}

    def stage_figures(self) -> list[dict[str, float] | None]:
        """What every stage has told of its newest updates, about once a second; nobody waits for it.

        Returns:
            for each stage version, drift, waiting_share (0 to 1), samples_per_second, tokens_per_second and loss, as of
            an update not long ago; None for a stage that has told nothing yet.  The rates are those of all replicas,
            as if these were like the first; tokens are counted where the inputs are integers [samples, length].
        """
        before = self.global_steps - self._runner.meter.version
        first, *_ = newest = self._assembly.bulletin.read()
        each_has = {"samples_per_second": self.train_micro_batch_size_per_gpu() * self.dp_world_size}
        if first is not None and first.tokens:
            each_has["tokens_per_second"] = first.tokens * self.dp_world_size
        return [each and each.told(before, **each_has) for each in newest]

    def take_update(self, losses: torch.Tensor) -> None:
        """See `StageLocalEngine.take_update`: sum and reduce the gradients, step, and keep what there is to report."""
        self.report()  # the update before: monitors want steps that never go back
        # The micro-batches in flight go on backward through these parameters: that is PACI, not a mistake.
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.module.parameters())):
            self._ties.exchange(self._runner.at, now=self._runner.flushing)
            with self._waiting_for_replicas("updated"):
                self._exec_reduce_grads()
                self._exec_optimizer_step()
        self._assembly.close_update()
        if self._prediction is not None:
            note_update(self, self._prediction)
        if self._reporter is not None and self._reporter.wants(self.global_steps):
            update = Update(
                step=self.global_steps,
                samples=self.global_samples,
                losses=HostCopy(self._mean_over_replicas(losses)),
                names=self._additional_names(),
                drift=self._runner.window_drift,
                seconds=self._runner.seconds(),
                at=time.perf_counter(),
            )
            self._reporter.add(update)

    def report(self, waits: bool = True) -> None:
        """Print and monitor the newest update that is due, once; where the device is not that far, only if `waits`."""
        if self._reporter is not None:
            self._reporter.flush(waits)

    def post_sum(self, number: int) -> None:
        """See `StageLocalEngine.post_sum`; nothing happens where the weight is frozen."""
        self._ties.post_sum(number, self._runner.at)

    def __del__(self) -> None:
        if self._ending is not None:
            self._ending.forgotten(self)
        getattr(super(), "__del__", bool)()  # which the oldest supported versions have not

    def _read_batch(self, source: Iterator[Any] | None) -> None:
        """Take a whole batch from the data before anything is computed, and announce it to the other stages."""
        pulled: list[Any] = []

        def pull() -> bool:
            with suppress(StopIteration):
                while source is not None and len(pulled) < self.micro_batches:
                    pulled.append(next(source))
            self.data_iterator = None if source is None else iter(pulled)
            return source is None or len(pulled) == self.micro_batches

        def read() -> list[int] | None:
            return self.number_shapes(pulled) if pull() else None

        # Other stages read before they wait: an iterator may exchange labels or noise with that of the first stage.
        has_read = self.is_first_stage() or pull()
        next_op = Op(OpKind.FORWARD, self._runner.admitted)
        if not self._assembly.links.announce(next_op, self.micro_batches, read):
            self._empty()
            raise DataEndedError(
                f"the first stage's data iterator ended before it gave {self.micro_batches} micro-batches of a batch; "
                "the pipe is drained and every stage stands at the same version: save a checkpoint and stop, or wrap "
                "the loader in deepspeed.utils.RepeatingLoader"
            )
        if not has_read:
            raise DataEndedError(
                f"the data iterator of the last stage ended after {len(pulled)} of {self.micro_batches} micro-batches, "
                "the first stage's did not: give both the same data"
            )
        if self.is_first_stage():
            self._assembly.bulletin.count_tokens([each[0] for each in pulled if isinstance(each, tuple | list)])

    def _empty(self) -> None:
        if self._runner.admitted:
            self.module.train()
        with self._accounted():
            self._runner.drain()
        if self._ending is not None:
            self._ending.keep(self)
        self.report()
        if self._stage_mpu.get_model_parallel_rank() == 0:
            self._assembly.write_recording()

    def _check_schedule(self, name: str, spec: PipelineSpec) -> None:
        """Raises ConfigError where the schedule does not exist for the job's spec, and UnsupportedError, on every rank,
        where it splits a backward that cannot be split."""
        if name != "1f1b":  # it runs as far ahead as the links' slack lets it: its order is that of PACI, drained
            schedule(name).check(spec)
        if schedule(name).splits_backward:
            refuse_together(why_not_split(self), refused(name))

    def _choose_schedule(self) -> None:
        warms_up = self.global_steps < self._options.flush_warmup_steps
        self._assembly.begin_batch(schedule(self._schedule), warms_up, self._empty)
        if self._norm_group is not None:
            self._norm_group.flushing = self._runner.flushing

    def _first_losses(self, losses: torch.Tensor | None) -> torch.Tensor | None:
        """The losses of the engine's first batch: the last stage's, where this stage has finished no micro-batch."""
        runner = self._runner
        if not runner.admitted or runner.spec.accumulation > runner.spec.look_ahead(0):
            return losses  # every stage has finished some
        told = torch.zeros(1 + len(self._additional_names()))
        if losses is not None and self.is_last_stage():
            told = losses.cpu()
        first_op = Op(OpKind.FORWARD, runner.admitted - runner.spec.accumulation)
        self._assembly.links.tell_from_last(first_op, told)
        return told.to(self.device) if losses is None else losses

    def _aggregate(self, losses: torch.Tensor | None) -> torch.Tensor:
        """The mean over the replicas, kept where DeepSpeed keeps it; for None that of the call before, or NaN."""
        names = self._additional_names()
        if losses is not None:
            self._newest_losses = self._mean_over_replicas(losses)
        newest = self._newest_losses
        if newest is None:
            newest = torch.full((1 + len(names),), torch.nan, device=self.device)
        self.agg_train_loss = newest[0].clone()  # a training loop may add to it in place
        self.agg_additional_losses = OrderedDict(zip(names, newest[1:], strict=True)) if names else None
        return self.agg_train_loss

    def _additional_names(self) -> tuple[str, ...]:
        return tuple(self.module.get_additional_losses() or ())

    def _mean_over_replicas(self, losses: torch.Tensor) -> torch.Tensor:
        if self.is_data_parallel:
            losses = losses / self.dp_world_size
            with self._waiting_for_replicas("averaged losses"):
                dist.all_reduce(losses, group=self.grid.get_data_parallel_group())
        return losses

    def _waiting_for_replicas(self, doing: str) -> AbstractContextManager[None]:
        peers = "the replicas of this stage" if self.is_data_parallel else "the slices of this stage"
        ranks = self._stage_ranks
        if self._norm_group is not None and self._runner.flushing:
            peers, ranks = f"the other stages and {peers}", {*ranks, *self.grid.pp_group}
        return waiting(self.stage_id, f"{doing} ({self._runner.at}) together with", peers, ranks, self._timeout)

"""DeepSpeed's PipelineEngine, executing PACI's stream instead of a flushed batch.

What a micro-batch's forward and backward and a stage's update *are* stays DeepSpeed's (`_exec_forward_pass`,
`_exec_backward_pass`, `_exec_reduce_grads`, `_exec_optimizer_step` and what they call).  When they run, and what is
sent in between, comes from the core through the StageRunner.  What DeepSpeed does across stages in every batch is local
or late here: gradient norms and overflow flags are the stage's own (`StageMpu`), the loss comes upstream with the
gradients.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.utils import is_model_parallel_parameter

from paci_schedule import trace
from paci_schedule.adapters.choice import check_schedule
from paci_schedule.adapters.deepspeed.checks import check_supported
from paci_schedule.adapters.deepspeed.compute import EngineCompute
from paci_schedule.adapters.deepspeed.device import take_device
from paci_schedule.adapters.deepspeed.options import PaciOptions
from paci_schedule.adapters.deepspeed.prediction import build_prediction, check_spec, note_update
from paci_schedule.adapters.deepspeed.report import HostCopy, Reporter, Update
from paci_schedule.adapters.deepspeed.stage_mpu import StageMpu
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError, DataEndedError, UnsupportedError
from paci_schedule.predict import clip_factor
from paci_schedule.runtime.deferred.norms import CarriedNorms, NormGroup
from paci_schedule.runtime.deferred.tied import TiedGradient, delay_between, drop_overflow
from paci_schedule.runtime.links import Links
from paci_schedule.runtime.stage import StageRunner
from paci_schedule.runtime.stopwatch import DATA, Stopwatch
from paci_schedule.runtime.upload import upload
from paci_schedule.runtime.waiting import shorten_timeout, waiting

__all__ = ["PaciPipelineEngine"]

logger = logging.getLogger(__name__)

_LATE = "paci_schedule"  # the key of our part in a checkpoint's client state


class PaciPipelineEngine(PipelineEngine):
    """A pipeline engine whose stages never flush between batches and update by themselves.

    Constructed by ``deepspeed.initialize`` when the config says ``"pipeline_schedule": "paci"``.  Used like
    DeepSpeed's; what is new is `drain`, `pipeline_stats` and `set_pipeline_schedule`.

    `get_global_grad_norm` is the norm that this stage's latest update, number `global_steps`, was clipped by: its own
    at that update, other stages' of the updates that `runtime.norms` says.

    Raises:
        ConfigError: an option that the rules do not allow.
        UnsupportedError: a feature that PACI does not run with.
        LinkError: a neighbouring stage or a replica did not answer within ``"paci": {"timeout": seconds}``.
    """

    def __init__(
        self, has_bool_tensors: bool = False, *args: Any, config_class: DeepSpeedConfig, **kwargs: Any
    ) -> None:
        self._runner: StageRunner | None = None
        self._options = options = PaciOptions.read(config_class._param_dict)
        self._schedule = "paci"
        module: PipelineModule = kwargs["model"]
        device = take_device(kwargs.get("args"))
        check_supported(config_class, options, module)
        grid = module.mpu()
        self._timeout = timeout = timedelta(seconds=options.timeout)
        spec = PipelineSpec(
            stages=module.num_stages,
            accumulation=config_class.gradient_accumulation_steps,
            extra_in_flight=options.extra_in_flight,
        )
        self._norms = self._norm_group = None
        if config_class.gradient_clipping > 0 and options.clip == "global" and spec.stages > 1:
            pipeline = grid.get_pipe_parallel_group()
            self._norms = CarriedNorms(
                spec, grid.get_stage_id(), pipeline, device, agrees=bool(module.tied_comms), timeout=timeout
            )
            self._norm_group = NormGroup(self._norms, grid.get_slice_parallel_group(), grid.get_model_parallel_group())
        self._stage_mpu = StageMpu(grid, self._norm_group)
        super().__init__(has_bool_tensors, *args, config_class=config_class, **kwargs)
        self._reporter = (
            Reporter(self.monitor, self.steps_per_print(), speaks=self.global_rank == 0)
            if self.is_first_stage()
            else None
        )
        # DeepSpeed's slicing of messages over tensor-parallel ranks is its own protocol; ours sends them whole.
        self.is_pipe_partitioned = self.is_grad_partitioned = False
        self._tied = self._tied_gradients(spec)
        for group in (
            grid.get_data_parallel_group(),
            grid.get_slice_parallel_group(),
            grid.get_model_parallel_group(),
            grid.get_pipe_parallel_group(),
        ):
            shorten_timeout(group, timeout)
        self._stage_ranks = grid.topology().filter_match(pipe=self.stage_id)
        pipelines = self.grid.topology().get_axis_comm_lists("pipe")
        self._links = Links(
            spec, pipelines, self.device, timeout, early_receives=options.early_receives, record=options.record
        )
        self._stopwatch = Stopwatch(self.device, records=options.record is not None)
        gathering = partial(self._waiting_for_replicas, "gathered predicted weights")
        self._prediction = build_prediction(self, options, spec, gathering)
        self._runner = StageRunner(
            spec,
            self.stage_id,
            EngineCompute(self),
            self._links,
            self._stopwatch,
            self._norms,
            [self._stages_of(self._tied[name].ranks) for name in self.ties_across_stages()],
            options.early_receives,
            self._prediction,
        )

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        """Take in one batch: `gradient_accumulation_steps` micro-batches from `data_iter`.

        On return, d_s = P-1-s backwards of stage s are outstanding; they are done in the next call or by `drain`.

        Returns:
            float32[], on the device, without waiting for it: the mean loss over the micro-batches that this stage
            *finished* in this call, averaged over the data-parallel replicas.  That is this batch's loss at the last
            stage, and d_s micro-batches late at stage s.  NaN as long as a stage has finished none.

        Raises:
            ConfigError: `data_iter` is no iterator; raised before anything is run.
            DataEndedError: the iterator ended before a whole batch.  The pipe has been drained; save and stop.
            LinkError: a neighbouring stage or a replica did not answer in time.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() requires gradients enabled. Use eval_batch() instead.")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self._stopwatch.start()
        self._choose_schedule()
        source, pulled = self.data_iterator, []

        def pull() -> bool:
            with suppress(StopIteration):
                while source is not None and len(pulled) < self.micro_batches:
                    pulled.append(next(source))
            return source is None or len(pulled) == self.micro_batches

        if not self._links.announce(Op(OpKind.FORWARD, self._runner.admitted), pull):
            self.drain()
            raise DataEndedError(
                f"the first stage's data iterator ended before it gave {self.micro_batches} micro-batches of a batch; "
                "the pipe is drained and every stage stands at the same version: save a checkpoint and stop, or wrap "
                "the loader in deepspeed.utils.RepeatingLoader"
            )
        if not self.is_first_stage() and not pull():
            raise DataEndedError(
                f"the data iterator of the last stage ended after {len(pulled)} of {self.micro_batches} micro-batches, "
                "the first stage's did not: give both the same data"
            )
        self._stopwatch.lap(DATA)
        self.module.train()
        self._compute_loss = True  # an evaluation may have done without
        self.fwd_outputs, self.total_loss, self.total_additional_losses = [], None, None
        self.data_iterator = source if source is None else iter(pulled)
        try:
            losses = self._runner.train_batch()
        finally:
            self.data_iterator = source
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
            schedule: "paci", or "1f1b" for a flush after every batch, as DeepSpeed's own engine computes it.

        Raises:
            ConfigError: an unknown name.
        """
        self._schedule = check_schedule(schedule, f"schedule={schedule!r}")
        self.drain()

    def drain(self) -> torch.Tensor:
        """Finish the outstanding backwards; call it on every rank.

        Afterwards the pipe is empty and every stage has the same version.

        Returns:
            float32[]: the mean loss over the micro-batches finished in this call, as in `train_batch`.
        """
        if self._runner.admitted:
            self.module.train()
        losses = self._runner.drain()
        if self._reporter is not None:
            self._reporter.flush()
        if self._options.record is not None and self._stage_mpu.get_model_parallel_rank() == 0:
            replica = self.grid.get_data_parallel_id()
            trace.write(self._options.record, self._runner.spec, self.stage_id, replica, self._stopwatch.spans())
        return self._aggregate(losses)

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

    def take_update(self, losses: torch.Tensor) -> None:
        """This stage's update: reduce over its replicas, step, and say what there is to say.

        Args:
            losses: float32[n], the mean over the update's micro-batches of the loss and of the additional losses.
        """
        # The micro-batches in flight go on backward through these parameters: that is PACI, not a mistake.
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.module.parameters())):
            for name, weight in self._tied_weights().items():
                if weight.requires_grad:
                    gradient, tied = self._tied_gradient(name, weight), self._tied[name]
                    with self._waiting_for_copies(tied):
                        tied.exchange_now(gradient) if self._runner.flushing else tied.exchange(gradient)
            with self._waiting_for_replicas("updated"):
                self._exec_reduce_grads()
                self._exec_optimizer_step()
        if self._norms is not None:
            self._norms.close_update()
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

    def post_sum(self, number: int) -> None:
        """Start the next sum of this stage's tied weight with this number, unless it is frozen."""
        name = self.ties_across_stages()[number]
        if self._tied_weights()[name].requires_grad:
            with self._waiting_for_copies(self._tied[name]):
                self._tied[name].post()

    # What needs an empty pipe drains it first.

    def eval_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, after a `drain`."""
        self.drain()
        everyone = range(dist.get_world_size())
        with waiting(self.stage_id, "evaluated together with", "the other ranks", everyone, self._timeout):
            # DeepSpeed begins with a barrier of its own, which may take as long as its default group lets it.
            dist.barrier(async_op=True).wait(self._timeout)
            return super().eval_batch(*args, **kwargs)

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """As DeepSpeed's, after a `drain`, with what is late by design.

        That is: carried norms, tied gradients' sums and the clip factor for the next predictions.
        """
        self.drain()
        late = {
            "norms": self._norms.state() if self._norms else [],
            "tied": self._pending_sums(),
            "factor": self._prediction.factor if self._prediction else None,
        }
        state = {**(client_state or {}), _LATE: late}
        return super().save_checkpoint(save_dir, tag, state, save_latest, exclude_frozen_parameters)

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

        What is late by design is on its way to the optimizer: it is replaced where the optimizer's states are.
        """
        self.drain()
        path, client_state = super().load_checkpoint(
            load_dir,
            tag,
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
        )
        late = (client_state or {}).pop(_LATE, {"norms": [], "tied": {}})
        if path is not None and load_optimizer_states and not load_module_only:
            self._load_late(path, late)
        if self._reporter is not None:
            self._reporter.begin(self.global_steps, self.global_samples)
        return path, client_state

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, after a `drain`."""
        self.drain()
        return super().save_16bit_model(*args, **kwargs)

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """As DeepSpeed's, after a `drain`: the number of micro-batches to an update changes.

        Raises:
            UnsupportedError: predictions cannot go on with so few.
        """
        self.drain()
        accumulation = train_batch_size // (self.train_micro_batch_size_per_gpu() * self.dp_world_size)
        spec = replace(self._runner.spec, accumulation=max(1, accumulation))
        if self._prediction is not None:
            check_spec(self, spec)
        super().set_train_batch_size(train_batch_size)
        self._runner.respec(spec)
        for name, fresh in self._tied_gradients(spec).items():
            self._tied[name].delay = fresh.delay

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """As DeepSpeed's, after a `drain`: the shapes of the messages change."""
        self.drain()
        super().set_train_micro_batch_size(micro_batch_size)
        self.reset_activation_shape()

    def reset_activation_shape(self) -> None:
        """As DeepSpeed's, after a `drain`: the next micro-batch may have another shape."""
        self.drain()
        super().reset_activation_shape()
        self._links.reset_shapes()

    def destroy(self) -> None:
        """As DeepSpeed's, after a `drain`; not while an error is on its way up."""
        if self._runner is not None and not self._runner.interrupted and sys.exc_info()[0] is None:
            self.drain()
        super().destroy()

    def __del__(self) -> None:
        self._runner = None  # a stage that is merely forgotten does not wait for its neighbours
        super().__del__()

    # DeepSpeed's own steps, made local to the stage, and its reading of data, which kept the host waiting.

    def _next_batch(self) -> list[Any]:
        """The next micro-batch; what this stage takes of it, inputs or labels, is on its way to the device."""
        taken = {0} if self.is_first_stage() else set()
        if self.is_last_stage():
            taken.add(1)
        parts = enumerate(super()._next_batch())
        return [upload(part, self.device) if number in taken else part for number, part in parts]

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: list[torch.nn.Parameter]) -> None:
        if not any(parameter.requires_grad for parameter in self.module.parameters()):
            # A stage of pure functions or frozen layers still needs an optimizer to build, step and save.
            dtype = next(dtype for dtype in (self._mixed_precision_dtypes()[0], torch.float32) if dtype is not None)
            nothing = torch.nn.Parameter(torch.zeros(1, dtype=dtype, device=self.device))
            self.param_names[nothing] = "no_parameters_in_this_stage"
            model_parameters = [nothing]
        grid, self.mpu = self.mpu, self._stage_mpu
        try:
            super()._configure_optimizer(client_optimizer, model_parameters)
        finally:
            self.mpu = grid
        if isinstance(self.optimizer, BF16_Optimizer):
            self.optimizer.get_grads_for_norm = partial(_some, self.optimizer.get_grads_for_norm, self.device)

    def clip_fp32_gradients(self) -> None:
        first_slice = self._stage_mpu.get_model_parallel_rank() == 0
        with_gradient = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        norms = [
            parameter.grad.norm()
            for parameter in with_gradient
            # Once: not again for the copies of a tied weight, nor for what the tensor-parallel ranks all hold.
            if not parameter.ds_pipe_replicated and (first_slice or is_model_parallel_parameter(parameter))
        ]
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.device)
        deepspeed.comm.all_reduce(square, group=self._stage_mpu.get_model_parallel_group())
        self._global_grad_norm = square.sqrt()
        scale = clip_factor(self.gradient_clipping(), self._global_grad_norm)
        for parameter in with_gradient:
            parameter.grad.mul_(scale)

    def _exec_reduce_grads(self) -> None:
        shares = any(len(comm["ranks"]) > 1 for comm in self.module.tied_comms.values())
        # ZeRO keeps its sums to itself; as it divides first, they are finite if their summands are.
        before = self.zero_optimization() and not self.using_bf16_optimizer
        if shares and before:
            drop_overflow(self._gradients())
        super()._exec_reduce_grads()
        if shares and not before:
            drop_overflow(self._gradients())

    def _gradient(self, weight: torch.nn.Parameter) -> torch.Tensor | None:
        """What this update's micro-batches have accumulated."""
        return getattr(weight, "_hp_grad", None) if self.using_bf16_optimizer else weight.grad

    def _gradients(self) -> Iterator[torch.Tensor]:
        every = (self._gradient(weight) for weight in self.module.parameters() if weight.requires_grad)
        return (gradient for gradient in every if gradient is not None)

    def _tied_gradients(self, spec: PipelineSpec) -> dict[str, TiedGradient]:
        """One for each entry of the module's tied weights, in its order, by a name that says which stages hold it."""
        tied = {}
        for key, comm in self.module.tied_comms.items():
            stages = self._stages_of(comm["ranks"])
            delay = delay_between(spec, min(stages), max(stages))
            for weight in comm["weight_attr"]:
                name = f"{key}.{weight} of stages {stages} of {spec.stages}"
                tied[name] = TiedGradient(comm["group"], delay, self._timeout)
        return tied

    def _stages_of(self, ranks: list[int]) -> list[int]:
        return [self.grid.topology().get_coord(rank).pipe for rank in ranks]

    def _tied_weights(self) -> dict[str, torch.nn.Parameter]:
        """This stage's copies, by the names of `_tied_gradients`."""
        weights = (weight for weight, _ in self.module.get_tied_weights_and_groups())
        return dict(zip(self._tied, weights, strict=True))

    def ties_across_stages(self) -> list[str]:
        """The names of the ties that several stages share; sorted, for the module's order differs between ranks."""
        return sorted(name for name, tied in self._tied.items() if len(tied.ranks) > 1)

    def late_weights(self) -> list[torch.nn.Parameter]:
        """This stage's copies of weights that several stages share: what updates apply to them is an older sum."""
        copies = self._tied_weights()
        return [copies[name] for name in self.ties_across_stages()]

    def _tied_gradient(self, name: str, weight: torch.nn.Parameter) -> torch.Tensor:
        """The gradient of this stage's copy at this update; zeros if no loss depends on it."""
        gradient = self._gradient(weight)
        if gradient is None and self.using_bf16_optimizer:
            raise UnsupportedError(
                f"tied weight {name}: no loss depends on the copy of stage {self.stage_id}, so that BF16_Optimizer has "
                "no gradient for the others' sum; freeze the weight, use it, or train in fp32"
            )
        if gradient is None:
            gradient = weight.grad = torch.zeros_like(weight)
        return gradient

    def _pending_sums(self) -> dict[str, list[torch.Tensor]]:
        """The tied gradients' pending sums, made the same on all replicas, of which one writes the checkpoint."""
        sums = {}
        for name, tied in self._tied.items():
            with self._waiting_for_copies(tied):
                sums[name] = tied.pending()
        if self.is_data_parallel:
            for total in (total for pending in sums.values() for total in pending):
                total.div_(self.dp_world_size)
                with self._waiting_for_replicas("averaged pending sums"):
                    dist.all_reduce(total, group=self.grid.get_data_parallel_group())
        return sums

    def _load_late(self, path: str, late: dict[str, Any]) -> None:
        """Go on with what `save_checkpoint` kept; without the sums of ties between other stages than here."""
        if self._norms:
            self._norms.load_state([row for row in late["norms"] if len(row) == self.num_stages])
        factor = late.get("factor")
        if self._prediction is not None:
            self._prediction.factor = None if factor is None else factor.to(self.device)
        for name, tied in self._tied.items():
            tied.load_pending([total.to(self.device) for total in late["tied"].get(name, [])])
        dropped = [name for name, sums in late["tied"].items() if sums and name not in self._tied]
        if dropped and self.grid.get_data_parallel_id() == 0:
            logger.warning("%s: pending gradient sums dropped, no such tie here: %s", path, "; ".join(dropped))

    def _choose_schedule(self) -> None:
        """Flush or not: decided while the pipe is empty, when every stage stands at the same update."""
        runner = self._runner
        if runner.admitted:
            return
        flushing = self._schedule == "1f1b" or self.global_steps < self._options.flush_warmup_steps
        if runner.flushing and not flushing and self._norms is not None:
            self._norms.exchange()
        runner.flushing = flushing
        if self._norm_group is not None:
            self._norm_group.flushing = flushing

    def _aggregate(self, losses: torch.Tensor | None) -> torch.Tensor:
        """The mean over the replicas, kept where DeepSpeed keeps it; NaN for None."""
        names = self._additional_names()
        if losses is None:
            losses = torch.full((1 + len(names),), torch.nan, device=self.device)
        else:
            losses = self._mean_over_replicas(losses)
        self.agg_train_loss = losses[0]
        self.agg_additional_losses = OrderedDict(zip(names, losses[1:], strict=True)) if names else None
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
        whom = "the replicas of this stage" if self.is_data_parallel else "the slices of this stage"
        ranks = self._stage_ranks
        if self._norm_group is not None and self._runner.flushing:
            whom, ranks = f"the other stages and {whom}", {*ranks, *self.grid.pp_group}
        return waiting(self.stage_id, f"{doing} ({self._runner.at}) together with", whom, ranks, self._timeout)

    def _waiting_for_copies(self, tied: TiedGradient) -> AbstractContextManager[None]:
        doing = f"summed ({self._runner.at}) the gradients of a tied weight over"
        return waiting(self.stage_id, doing, "the stages that hold it", tied.ranks, self._timeout)


def _some(gradients: Callable[[bool], Any], device: torch.device, for_clipping: bool = False) -> Any:
    """The gradients, or a zero for none: BF16_Optimizer takes no norm of nothing, as where all weights are frozen."""
    found = gradients(for_clipping)
    return found if for_clipping or found[0] else ([torch.zeros(1, device=device)], *found[1:])

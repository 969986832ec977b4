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
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.utils import clip_grad_norm_

from paci_schedule.adapters.deepspeed.checks import check_supported
from paci_schedule.adapters.deepspeed.compute import EngineCompute
from paci_schedule.adapters.deepspeed.options import PaciOptions
from paci_schedule.adapters.deepspeed.report import HostCopy, Reporter, Update
from paci_schedule.adapters.deepspeed.stage_mpu import StageMpu
from paci_schedule.errors import DataEndedError
from paci_schedule.ops import Op, OpKind
from paci_schedule.runtime.links import Links
from paci_schedule.runtime.stage import StageRunner
from paci_schedule.runtime.timeline import Timeline
from paci_schedule.spec import PipelineSpec

__all__ = ["PaciPipelineEngine"]

logger = logging.getLogger(__name__)


class PaciPipelineEngine(PipelineEngine):
    """A pipeline engine whose stages never flush between batches and update by themselves.

    Constructed by ``deepspeed.initialize`` when the config says ``"pipeline_schedule": "paci"``.  Used like
    DeepSpeed's; what is new is `drain` and `pipeline_stats`.

    Raises:
        ConfigError: an option that the rules do not allow.
        UnsupportedError: a feature that PACI does not run with.
        LinkError: a neighbouring stage did not answer within ``"paci": {"timeout": seconds}``.
    """

    def __init__(
        self, has_bool_tensors: bool = False, *args: Any, config_class: DeepSpeedConfig, **kwargs: Any
    ) -> None:
        self._runner: StageRunner | None = None
        options = PaciOptions.read(config_class._param_dict)
        module: PipelineModule = kwargs["model"]
        check_supported(config_class, module)
        self._stage_mpu = StageMpu(module.mpu())
        super().__init__(has_bool_tensors, *args, config_class=config_class, **kwargs)
        self._compute_loss = True
        self._seconds_told = 0.0, 0.0
        self._reporter = (
            Reporter(self.monitor, self.steps_per_print(), self.train_batch_size(), speaks=self.global_rank == 0)
            if self.is_first_stage()
            else None
        )
        spec = self._spec()
        pipelines = self.grid.topology().get_axis_comm_lists("pipe")
        self._links = Links(spec, pipelines, self.device, timedelta(seconds=options.timeout))
        self._runner = StageRunner(spec, self.stage_id, EngineCompute(self), self._links, Timeline(self.device))
        if self.global_rank == 0 and self.gradient_clipping() > 0 and self.num_stages > 1:
            logger.warning(
                "gradient_clipping=%g (DeepSpeed's default is 1.0) clips each stage by the norm of its own gradients, "
                "not by the norm over all stages",
                self.gradient_clipping(),
            )

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        """Take in one batch: `gradient_accumulation_steps` micro-batches from `data_iter`.

        On return, d_s = P-1-s backwards of stage s are outstanding; they are done in the next call or by `drain`.

        Returns:
            float32[], on the device, without waiting for it: the mean loss over the micro-batches that this stage
            *finished* in this call, averaged over the data-parallel replicas.  That is this batch's loss at the last
            stage, and d_s micro-batches late at stage s.  NaN as long as a stage has finished none.

        Raises:
            DataEndedError: the iterator ended before a whole batch.  The pipe has been drained; save and stop.
            LinkError: a neighbouring stage did not answer in time.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() requires gradients enabled. Use eval_batch() instead.")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        source, pulled = self.data_iterator, []

        def pull() -> bool:
            if source is not None:
                pulled.extend(islice(source, self.micro_batches))
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
        self.module.train()
        self.fwd_outputs, self.total_loss, self.total_additional_losses = [], None, None
        self.data_iterator = source if source is None else iter(pulled)
        try:
            losses = self._runner.train_batch()
        finally:
            self.data_iterator = source
        return self._aggregate(losses)

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
        return self._aggregate(losses)

    def pipeline_stats(self) -> dict[str, Any]:
        """What this stage has done, counted as it happened.

        Returns:
            stage, stages, accumulation: where it stands in which pipeline;
            version: updates applied;
            forwards, backwards: micro-batches done since construction;
            in_flight, peak_in_flight: micro-batches between their forward and backward, now and at most;
            max_drift, drift_bound, drift_histogram: in updates; micro-batches for each drift;
            compute_seconds, wait_seconds: what the stage computed and waited since the last call to this (on CUDA: ops
            that the device has finished).
        """
        runner = self._runner
        compute, wait = runner.seconds()
        since, self._seconds_told = self._seconds_told, (compute, wait)
        return {
            "stage": self.stage_id,
            "stages": self.num_stages,
            "accumulation": runner.spec.accumulation,
            "version": self.global_steps,
            "forwards": runner.forwards,
            "backwards": runner.backwards,
            "in_flight": runner.meter.in_flight,
            "peak_in_flight": runner.peak_in_flight,
            "max_drift": runner.meter.largest,
            "drift_bound": runner.drift_bound,
            "drift_histogram": dict(sorted(runner.meter.histogram.items())),
            "compute_seconds": compute - since[0],
            "wait_seconds": wait - since[1],
        }

    def take_update(self, losses: torch.Tensor) -> None:
        """This stage's update: reduce over its replicas, step, and say what there is to say.

        Args:
            losses: float32[n], the mean over the update's micro-batches of the loss and of the additional losses.
        """
        # The micro-batches in flight go on backward through these parameters: that is PACI, not a mistake.
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.module.parameters())):
            self._exec_reduce_grads()
            self._exec_optimizer_step()
        if self._reporter is not None and self._reporter.wants(self.global_steps):
            update = Update(
                step=self.global_steps,
                samples=self.global_samples,
                losses=HostCopy(self._mean_over_replicas(losses)),
                names=self._additional_names(),
                drift=self._runner.meter.largest,
                seconds=self._runner.seconds(),
                at=time.perf_counter(),
            )
            self._reporter.add(update)

    # What needs an empty pipe drains it first.

    def eval_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, after a `drain`."""
        self.drain()
        return super().eval_batch(*args, **kwargs)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, after a `drain`."""
        self.drain()
        return super().save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, after a `drain`."""
        self.drain()
        return super().load_checkpoint(*args, **kwargs)

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, after a `drain`."""
        self.drain()
        return super().save_16bit_model(*args, **kwargs)

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """As DeepSpeed's, after a `drain`: the number of micro-batches to an update changes."""
        self.drain()
        super().set_train_batch_size(train_batch_size)
        self._runner.respec(self._spec())

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

    # DeepSpeed's own steps, made local to the stage.

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: list[torch.nn.Parameter]) -> None:
        if not any(parameter.requires_grad for parameter in self.module.parameters()):
            # A stage of pure functions still needs an optimizer that can be built, stepped and saved.
            dtype = next(dtype for dtype in (self._mixed_precision_dtypes()[0], torch.float32) if dtype is not None)
            nothing = torch.nn.Parameter(torch.zeros(1, dtype=dtype, device=self.device))
            self.param_names[nothing] = "no_parameters_in_this_stage"
            model_parameters = [nothing]
        grid, self.mpu = self.mpu, self._stage_mpu
        try:
            super()._configure_optimizer(client_optimizer, model_parameters)
        finally:
            self.mpu = grid

    def clip_fp32_gradients(self) -> None:
        if any(parameter.grad is not None for parameter in self.module.parameters()):
            clip_grad_norm_(self.module.parameters(), self.gradient_clipping(), mpu=self._stage_mpu)

    def _spec(self) -> PipelineSpec:
        return PipelineSpec(stages=self.num_stages, accumulation=self.micro_batches)

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
            dist.all_reduce(losses, group=self.grid.get_data_parallel_group())
        return losses

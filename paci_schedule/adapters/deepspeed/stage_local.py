"""DeepSpeed's own steps, made local to the stage.

DeepSpeed's optimizers reduce gradient norms and overflow flags over the "model parallel" group, which spans the
pipeline stages: that is a flush in disguise.  They are shown the process grid of one stage instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import utils
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.runtime.utils import is_model_parallel_parameter

from paci_schedule.adapters.versions import DEEPSPEED_BF16
from paci_schedule.errors import UnsupportedError
from paci_schedule.predict import clip_factor
from paci_schedule.runtime.deferred.tied import drop_overflow
from paci_schedule.runtime.finite import may_step
from paci_schedule.runtime.shapes import ShapeNumbers
from paci_schedule.runtime.upload import upload

__all__ = ["LEAST_SQUARE", "StageLocalEngine", "StageMpu"]

LEAST_SQUARE = 0.0 if hasattr(utils, "is_invalid_grad_norm") else 2.0**-126
"""What a squared norm is at least: older versions of BF16_Optimizer assert that it is above 0, as it is not before
norms or sums of tied gradients arrive.  The smallest normal number of fp32 changes no sum of real squares."""


class StageMpu:
    """One stage's view of a PipelineParallelGrid: model parallelism is tensor slicing only, and the pipe has one stage.

    Everything else is the grid's own answer.

    Args:
        grid: the job's.
        model_parallel: what stands for the group of all model-parallel ranks; None for the tensor-slicing group.
    """

    def __init__(self, grid: PipelineParallelGrid, model_parallel: dist.ProcessGroup | None = None) -> None:
        # Any, because pyright infers from DeepSpeed's code that a group is ProcessGroup | int | None.
        self._grid: Any = grid
        self._model_parallel = model_parallel or self._grid.get_slice_parallel_group()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model_parallel

    def get_model_parallel_rank(self) -> int:
        return self._grid.get_slice_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        return self._grid.get_slice_parallel_world_size()

    def get_pipe_parallel_world_size(self) -> int:
        return 1

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1


class StageLocalEngine(PipelineEngine):
    """A pipeline engine whose optimizer, clipping and reading of data wait for no other stage.

    Args:
        stage_mpu: the grid as the stage's optimizer sees it.
        skips: leave out an update whose gradient is not finite, where the optimizer does not do so by itself.
    """

    # DeepSpeed declares no types of its attributes; these are what a training engine's constructor leaves in them.
    basic_optimizer: torch.optim.Optimizer
    device: torch.device
    dp_world_size: int
    grid: PipelineParallelGrid
    micro_batches: int
    loss: torch.Tensor
    module: PipelineModule
    optimizer: Any
    """`basic_optimizer`, or one of DeepSpeed's classes that wrap it, which have no interface in common."""

    def __init__(self, *args: Any, stage_mpu: StageMpu, skips: bool, **kwargs: Any) -> None:
        self._stage_mpu, self._skips = stage_mpu, skips
        self._shape_numbers = ShapeNumbers()
        self._read_ahead: list[Any] | None = None  # the next micro-batch, on its way to the device
        super().__init__(*args, **kwargs)
        # DeepSpeed's slicing of messages over tensor-parallel ranks is its own protocol; our links send them whole.
        self.is_pipe_partitioned = self.is_grad_partitioned = False

    def gradient_of(self, weight: torch.nn.Parameter) -> torch.Tensor | None:
        """What the micro-batches of the coming update have accumulated for `weight`; None where nothing has."""
        return getattr(weight, "_hp_grad", None) if self.using_bf16_optimizer else weight.grad

    def take_update(self, losses: torch.Tensor) -> None:
        """Apply this stage's update.

        Args:
            losses: float32[n], the mean over the update's micro-batches of the loss and of the additional losses.
        """
        raise NotImplementedError

    def post_sum(self, number: int) -> None:
        """Start the next sum of this stage's tied weight with this number."""
        raise NotImplementedError

    def number_shapes(self, batch: list[Any]) -> list[int]:
        """At the first stage: the numbers that announce a batch (`runtime.links.Links.announce`).

        Args:
            batch: its micro-batches as the data iterator gave them, which are also what it gives next; empty on a rank
                that has no data iterator.
        """
        inputs = [data[0] for data in batch] if self.batch_fn is None else batch or [None] * self.micro_batches
        if self.batch_fn is not None:
            # It may change the shapes, and moves its results to the device: it is not asked for more than is due.
            self._read_ahead = self._next_batch()
        numbers = self._shape_numbers
        return [numbers.lowest, *(numbers.number(each, self._read_ahead) for each in inputs)]

    def _next_batch(self) -> list[Any]:
        """The next micro-batch; what this stage takes of it, inputs or labels, is on its way to the device."""
        if self._read_ahead is not None:
            batch, self._read_ahead = self._read_ahead, None
            return batch
        taken = {0} if self.is_first_stage() else set()
        if self.is_last_stage():
            taken.add(1)
        batch: Any = super()._next_batch()
        return [upload(part, self.device) if number in taken else part for number, part in enumerate(batch)]

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: list[torch.nn.Parameter]) -> None:
        if not any(parameter.requires_grad for parameter in self.module.parameters()):
            # A stage of pure functions or frozen layers still needs an optimizer to build, step and save.
            low = torch.float16 if self.fp16_enabled() else torch.bfloat16 if self.bfloat16_enabled() else None
            nothing = torch.nn.Parameter(torch.zeros(1, dtype=low or torch.float32, device=self.device))
            self.param_names[nothing] = "no_parameters_in_this_stage"
            model_parameters = [nothing]
        grid, self.mpu = self.mpu, self._stage_mpu
        try:
            super()._configure_optimizer(client_optimizer, model_parameters)
        finally:
            self.mpu = grid
        if self.bfloat16_enabled() and isinstance(self.optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer)):
            # Two of its names for kinds of optimizers are equal there (its change #7788 mends that).
            raise UnsupportedError(
                f'"bf16": DeepSpeed {deepspeed.__version__} takes its {type(self.optimizer).__name__} for it, whose '
                "loss scale divides every gradient by 65536, under 1F1B too; install a DeepSpeed "
                f'{DEEPSPEED_BF16}, or leave "bf16" out and cast the weights in the script'
            )
        if isinstance(self.optimizer, BF16_Optimizer):
            self.optimizer.get_grads_for_norm = partial(_or_a_least, self.optimizer.get_grads_for_norm, self.device)

    def _exec_backward_pass(self, buffer_id: int) -> None:
        # As 0.18.5 and newer do by themselves; 0.18.3 and 0.18.4 take a stage's backward for a user's, and refuse it.
        self._running_engine_backward = True
        try:
            super()._exec_backward_pass(buffer_id)
        finally:
            self._running_engine_backward = False

    def _take_model_step(self, lr_kwargs: Any) -> None:
        plain = self.optimizer is self.basic_optimizer  # DeepSpeed's own classes look at the norm themselves
        # Where a norm is summed over all stages, all of them decide together: this group is theirs then.
        group = self._stage_mpu.get_model_parallel_group()
        if self._skips and plain and not may_step(self.stage_id, self._gradients(), self.device, group):
            with _idle(self.optimizer):
                super()._take_model_step(lr_kwargs)
        else:
            super()._take_model_step(lr_kwargs)

    def clip_fp32_gradients(self) -> None:
        first_slice = self._stage_mpu.get_model_parallel_rank() == 0
        gradients = [(each, each.grad) for each in self.module.parameters() if each.grad is not None]
        norms = [
            gradient.norm()
            for parameter, gradient in gradients
            # Once: not again for the copies of a tied weight, nor for what the tensor-parallel ranks all hold.
            if not getattr(parameter, PIPE_REPLICATED) and (first_slice or is_model_parallel_parameter(parameter))
        ]
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.device)
        deepspeed.comm.all_reduce(square, group=self._stage_mpu.get_model_parallel_group())
        self._global_grad_norm = square.sqrt()
        scale = clip_factor(self.gradient_clipping(), self._global_grad_norm)
        for _, gradient in gradients:
            gradient.mul_(scale)

    def _exec_reduce_grads(self) -> None:
        shares = any(len(comm["ranks"]) > 1 for comm in self.module.tied_comms.values())
        # ZeRO keeps its sums to itself; as it divides first, they are finite if their summands are.
        before = self.zero_optimization() and not self.using_bf16_optimizer
        if shares and before:
            drop_overflow(self._gradients())
        super()._exec_reduce_grads()
        if shares and not before:
            drop_overflow(self._gradients())

    def _gradients(self) -> Iterator[torch.Tensor]:
        every = (self.gradient_of(weight) for weight in self.module.parameters() if weight.requires_grad)
        return (gradient for gradient in every if gradient is not None)


@contextmanager
def _idle(optimizer: Any) -> Iterator[None]:
    """Within it a step changes nothing, and DeepSpeed counts it as skipped."""
    step = vars(optimizer).get("step")  # of the object, where a schedule of rates counts the steps
    optimizer.step, optimizer.overflow = lambda: None, True
    try:
        yield
    finally:
        del optimizer.step, optimizer.overflow
        if step is not None:
            optimizer.step = step


def _or_a_least(gradients: Callable[[bool], Any], device: torch.device, for_clipping: bool = False) -> Any:
    """The gradients, and the least that a norm may be where it needs one, or where there are none, as where all weights
    are frozen: BF16_Optimizer takes no norm of nothing."""
    found = gradients(for_clipping)
    if for_clipping or (found[0] and not LEAST_SQUARE):
        return found
    return ([*found[0], torch.full((1,), LEAST_SQUARE**0.5, device=device)], *found[1:])

"""A stage's forward and backward in terms of Megatron-core's own (runtime.stage.StageCompute).

The update is the training loop's: it steps when the call returns, and every stage has then done the same backwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import backward_step, deallocate_output_tensor, forward_step
from megatron.core.utils import make_viewless_tensor

from paci_schedule.errors import DataEndedError
from paci_schedule.runtime.message import Payload

__all__ = ["ModelCompute"]


class ModelCompute:
    """One model chunk, as the StageRunner drives it.

    Args:
        model: the chunk, wrapped or not.
        config: its ModelParallelConfig.
        first, last: whether it is the first, or the last, of its pipeline.
        post_sum: starts the next sum of the tied weight with this number.
        predicts: stale forwards run on predicted weights.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: Any,
        first: bool,
        last: bool,
        post_sum: Callable[[int], None],
        predicts: bool,
    ) -> None:
        self._model, self._config, self._first, self._last, self._post_sum = model, config, first, last, post_sum
        # Megatron-core 0.16 wants the model's type, later versions do not.
        takes_type = "model_type" in inspect.signature(backward_step).parameters
        self._backward_extra = {"model_type": None} if takes_type else {}
        self._live: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
        self._losses: dict[int, torch.Tensor] = {}
        self._no_sync = ExitStack()
        self._predicts = predicts
        overlaps = getattr(getattr(model, "ddp_config", None), "overlap_param_gather", False)
        ddp: Any = model
        self._gathered_late = [*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups] if overlaps else []

    def begin(self, forward_step_func: Callable[..., Any], data: Iterator[Any] | None, accumulation: int) -> None:
        """A call begins: where its micro-batches come from, and how many make an update."""
        self._forward_step_func, self._data, self._accumulation = forward_step_func, data, accumulation
        self._forwards = 0
        self._reduced: list[Any] = []
        self._is_gathered = False
        if self._predicts:
            self._gather()
        self._no_sync.enter_context((self._config.no_sync_func or nullcontext)())

    def end(self) -> list[Any]:
        """A call ends.  Returns what the loss function gave for its micro-batches; empty but at the last stage."""
        self._no_sync.close()
        if self._config.grad_sync_func is not None and not self._first:
            self._config.grad_sync_func(self._model.parameters())
        return self._reduced

    def forward(self, micro_batch: int, inputs: Payload | None) -> Payload | None:
        received: torch.Tensor | None = None
        if inputs is not None:
            tensor = cast(torch.Tensor, inputs)  # as `forward` of the stage before returned it
            received = make_viewless_tensor(inp=tensor, requires_grad=True, keep_graph=False)
        try:
            stepped, tokens = forward_step(
                self._forward_step_func,
                self._data,
                self._model,
                self._accumulation,
                received,
                self._reduced,
                self._config,
                cp_group_size=parallel_state.get_context_parallel_world_size(),
                is_first_microbatch=self._forwards == 0,
                current_microbatch=micro_batch % self._accumulation,
                is_last_stage=self._last,
            )
        except StopIteration as error:
            raise DataEndedError(
                "the data iterator ended while the first stage read ahead: PACI takes in up to one micro-batch for "
                "each stage behind it; say how many calls there will be, config.paci = {'train_iters': n}, and the "
                "last ones read nothing ahead; an iterator for each call needs {'drain_interval': 1}"
            ) from error
        self._forwards += 1
        self._is_gathered = True  # by the hooks of its modules, each before its own forward
        output = cast(torch.Tensor, stepped)  # a list for a list of inputs only
        self._live[micro_batch] = received, output
        if self._last:
            loss = output.detach().float().reshape(1)
            if self._config.calculate_per_token_loss:
                self._losses[micro_batch] = torch.cat([loss, tokens.detach().to(loss).reshape(1)])
            else:
                self._losses[micro_batch] = loss * self._accumulation
            return None
        sent = output.detach()  # holds the storage until it has left, whatever becomes of the output
        deallocate_output_tensor(output, self._config.deallocate_pipeline_outputs)
        return sent

    def backward(self, micro_batch: int, gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        self._gather()
        inputs, output = self._live.pop(micro_batch)
        if (micro_batch + 1) % self._accumulation == 0 and (self._config.grad_sync_func is None or self._first):
            self._no_sync.close()
        gradient = backward_step(
            input_tensor=inputs,
            output_tensor=output,
            output_tensor_grad=gradients[0] if gradients else None,
            config=self._config,
            **self._backward_extra,
        )
        if inputs is None:  # at the first stage
            return ()
        return (torch.zeros_like(inputs) if gradient is None else cast(torch.Tensor, gradient),)

    def _gather(self) -> None:
        """Let every bucket of weights be gathered, with --overlap-param-gather, before an op that is no forward."""
        if not self._is_gathered:
            for group in self._gathered_late:
                if not group.param_gather_dispatched:
                    group.start_param_sync()
            for group in self._gathered_late:
                group.finish_param_sync(skip_next_bucket_dispatch=True)
        self._is_gathered = True

    def let_go(self) -> None:
        """Forget the micro-batches in flight."""
        self._live.clear()

    def losses(self, micro_batch: int) -> torch.Tensor:
        return self._losses.pop(micro_batch)

    def step(self, update: int, losses: torch.Tensor) -> None:
        """The training loop's own optimizer.step() follows."""

    def post_sum(self, tie: int) -> None:
        self._post_sum(tie)

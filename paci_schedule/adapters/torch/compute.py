"""A stage's forward and backward in terms of torch.distributed.pipelining's own (runtime.stage.StageCompute).

Of a ``PipelineStage`` only the methods that wrap the module's forward and autograd's backward are used: they know what
DistributedDataParallel and FSDP need.  Which micro-batch comes when, and its messages, are the runner's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.pipelining.stage import _PipelineStageBase

from paci_schedule.errors import UnsupportedError
from paci_schedule.runtime.message import Payload

__all__ = ["Batch", "ModuleCompute"]


@dataclass(frozen=True)
class Batch:
    """What one call brings for its micro-batches, by their number in the call.

    Attributes:
        first: the number, since the pipe was last empty, of its first micro-batch.
        args: of the module, at the first stage.
        kwargs: of the module, at every stage.
        targets: for the loss function, at the last stage.
        loss_kwargs: for the loss function.
        outputs: where the last stage's outputs go, detached; None where nobody asked for them.
    """

    first: int
    args: Sequence[tuple[Any, ...]]
    kwargs: Sequence[Mapping[str, Any]]
    targets: Sequence[Any]
    loss_kwargs: Mapping[str, Any]
    outputs: list[Any] | None


class ModuleCompute:
    """One stage's module, as the StageRunner drives it.

    Args:
        stage: that holds the module.
        loss_fn: (output, target) -> the loss of a micro-batch, a scalar.
        accumulation: a, micro-batches an update.
        scales: whether gradients are the mean over the micro-batches of an update, not their sum.
        update: applies the update with this number.
        post_sum: starts the next sum of the tied weight with this number.

    Attributes:
        batch: of the call that runs.
    """

    batch: Batch

    def __init__(
        self,
        stage: _PipelineStageBase,
        loss_fn: Callable[..., torch.Tensor],
        accumulation: int,
        scales: bool,
        update: Callable[[int], None],
        post_sum: Callable[[int], None],
    ) -> None:
        self._stage, self._loss_fn, self._accumulation, self._scales = stage, loss_fn, accumulation, scales
        self._update, self._post_sum = update, post_sum
        self._live: dict[int, tuple[list[Any], list[torch.Tensor]]] = {}
        self._losses: dict[int, torch.Tensor] = {}

    def forward(self, micro_batch: int, inputs: Payload | None) -> Payload | None:
        stage, batch = self._stage, self.batch
        at = micro_batch - batch.first
        args = list(batch.args[at]) if inputs is None else _tensors(inputs)
        if inputs is not None:
            for tensor in args:
                tensor.requires_grad_(tensor.is_floating_point())
        output = stage.forward_maybe_with_nosync(*args, **batch.kwargs[at])
        if not stage.is_last:
            outputs = _checked(output, stage.stage_index)
            self._live[micro_batch] = args, [tensor for tensor in outputs if tensor.is_floating_point()]
            return output if isinstance(output, torch.Tensor) else tuple(outputs)
        if batch.outputs is not None:
            batch.outputs.append(_detached(output))
        loss = self._loss_fn(output, batch.targets[at], **batch.loss_kwargs)
        self._live[micro_batch] = args, [loss]
        self._losses[micro_batch] = loss.detach().float().reshape(1)
        return None

    def backward(self, micro_batch: int, gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        stage = self._stage
        args, outputs = self._live.pop(micro_batch)
        if stage.is_last and self._scales:
            outputs = [outputs[0] / self._accumulation]
        needed = [at for at, output in enumerate(outputs) if output.requires_grad]
        found: Sequence[torch.Tensor | None] = [None] * len(args)
        if needed:  # a first stage may train nothing
            found, _ = stage.backward_maybe_with_nosync(
                "full",
                {
                    "stage_output": outputs[0] if stage.is_last else [outputs[at] for at in needed],
                    "output_grads": None if stage.is_last else [gradients[at] for at in needed],
                    "input_values": args,
                },
                last_backward=(micro_batch + 1) % self._accumulation == 0,
            )
        if stage.is_first:
            return ()
        return tuple(
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(args, found, strict=True)
            if tensor.is_floating_point()
        )

    def losses(self, micro_batch: int) -> torch.Tensor:
        return self._losses.pop(micro_batch)

    def step(self, update: int, losses: torch.Tensor) -> None:
        self._update(update)

    def post_sum(self, tie: int) -> None:
        self._post_sum(tie)


def _tensors(payload: Payload) -> list[torch.Tensor]:
    return [payload] if isinstance(payload, torch.Tensor) else list(payload)


def _checked(output: Any, stage: int) -> list[torch.Tensor]:
    """The tensors that a stage hands on."""
    outputs = list(output) if isinstance(output, tuple | list) else [output]
    for value in outputs:
        if type(value) is not torch.Tensor and not isinstance(value, torch.nn.Parameter):
            raise UnsupportedError(
                f"stage {stage} puts out a {type(value).__name__}: what goes from stage to stage must be a tensor or a "
                "tuple of plain tensors; hand on the local tensors, as DTensor.to_local() gives them"
            )
    return outputs


def _detached(output: Any) -> Any:
    """The same values outside the graph."""
    if isinstance(output, tuple | list):
        return type(output)(_detached(value) for value in output)
    return output.detach() if isinstance(output, torch.Tensor) else output

"""The backward of a micro-batch in two: the gradients of a stage's inputs (B), and later those of its weights (W).

The two functions that do it are those of torch.distributed.pipelining.  DeepSpeed's own backward does
both at once.  For the optimizers that `why_not_split` lets pass, it does only two things besides: it divides the loss
by the micro-batches of an update, and it adds the bfloat16 gradients of a micro-batch to their sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine

from paci_schedule.adapters.deepspeed.hooks import SPLIT_HOOKS
from paci_schedule.adapters.deepspeed.stage_local import StageLocalEngine
from paci_schedule.adapters.probing import look_up
from paci_schedule.errors import UnsupportedError

__all__ = ["SplitBackward", "why_not_split"]

_CANNOT = {  # words of PyTorch's or DeepSpeed's error: the reason and the remedy
    "compatible with .grad()": (
        "a layer checkpoints its activations by reentrant autograd, which knows no backward of inputs only; use "
        "checkpoint(..., use_reentrant=False)"
    ),
    "donated buffer": (
        "a compiled layer frees in B what W needs, since its backward was compiled under another schedule; leave "
        "engine.compile() out"
    ),
}


def why_not_split(engine: StageLocalEngine) -> Iterator[str]:
    """Why the backward of this stage cannot be split: the value, the rule and the remedy."""
    for name, there, detail in (look_up(*hook) for hook in SPLIT_HOOKS.items()):
        if not there:
            yield f"{name}: {detail}; install a tested version of its package"
    if "_backward_prologue_per_tensor" not in vars(PipelineEngine):
        yield (
            "this DeepSpeed divides gradients elsewhere than at the loss, which a split "
            "backward does not; install a newer one (docs/deepspeed.md has the versions)"
        )
    interval = engine.module.activation_checkpoint_interval
    if interval:
        yield (
            f"PipelineModule(activation_checkpoint_interval={interval}): B would recompute activations that W needs "
            "once more; set it to 0"
        )
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        if optimizer.immediate_grad_update:
            yield '"bf16": {"immediate_grad_update": true}: its hooks do not see gradients of weights; leave it out'
    elif optimizer is not engine.basic_optimizer:
        yield (
            f"{type(optimizer).__name__}: it takes gradients from hooks that do not see those of a split backward; use "
            'fp32 with "zero_optimization": {"stage": 0}, or "bf16" with fp32 sums ("data_types": {"grad_accum_dtype": '
            '"fp32"})'
        )


class SplitBackward:
    """The backwards of a stage that is not the first, in two parts.

    Args:
        engine: holds the stage's weights.
    """

    def __init__(self, engine: StageLocalEngine) -> None:
        self._engine = engine
        self._pending: dict[int, list[dict[str, Any]]] = {}
        self._is_checked = False

    def inputs(
        self,
        micro_batch: int,
        outputs: Sequence[torch.Tensor],
        gradients: list[torch.Tensor] | None,
        inputs: Sequence[torch.Tensor],
    ) -> None:
        """Give the `inputs` of a micro-batch their gradients.

        Args:
            micro_batch: its index.
            outputs: what the stage made of the inputs; at the last stage the loss.
            gradients: of the outputs; None for a loss.
            inputs: of which the gradients are wanted.

        Raises:
            UnsupportedError: a weight acts on the outputs where no input does, or a layer checkpoints activations in a
                way that cannot be split.
        """
        from torch.distributed.pipelining._backward import stage_backward_input

        if not self._is_checked:
            self._check(outputs, inputs)
        # torch cuts the graph at its outputs in place, which a view does not allow.
        outputs = [output.clone() if output._is_view() else output for output in outputs]
        try:
            _, groups = stage_backward_input(outputs, gradients, list(inputs), iter(self._weights()))
        except RuntimeError as error:
            reason = next((why for words, why in _CANNOT.items() if words in f"{error} {error.__cause__}"), None)
            if reason is None:
                raise
            raise UnsupportedError(f'{reason}, or "pipeline_schedule": "1f1b"') from error
        self._pending[micro_batch] = groups

    def weights(self, micro_batch: int) -> None:
        """Add the gradients of the weights of a micro-batch whose inputs have theirs."""
        from torch.distributed.pipelining._backward import stage_backward_weight

        engine, groups, weights = self._engine, self._pending.pop(micro_batch), self._weights()
        sums = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
        # A weight that is used twice is in several groups, whose graphs overlap.
        stage_backward_weight(iter(weights), groups, retain_graph=True)
        if engine.using_bf16_optimizer:
            engine.optimizer.update_hp_grads(clear_lp_grads=False)
        for weight, total in zip(weights, sums, strict=True):
            if not engine.using_bf16_optimizer and weight.grad is not None:
                # Autograd may give several weights one tensor, which may also be a message: a sum is one of its own.
                total = weight.grad.clone() if total is None else total.add_(weight.grad)
            weight.grad = total

    def _weights(self) -> list[torch.nn.Parameter]:
        return [weight for weight in self._engine.module.parameters() if weight.requires_grad]

    def _check(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        """Every output depends on an input, or on no weight: W finds weights on the way back from the inputs only."""
        names = {id(weight): name for name, weight in self._engine.module.named_parameters()}
        reachable = {id(tensor) for tensor in inputs}
        for output in outputs:
            leaves = _leaves(output)
            lost = [names[leaf] for leaf in leaves if leaf in names]
            if lost and not leaves & reachable:
                raise UnsupportedError(
                    f"{', '.join(sorted(lost))}: the loss depends on these weights where it does not depend on the "
                    "stage's inputs, and the split backward would lose their gradients; use "
                    '"pipeline_schedule": "1f1b"'
                )
        self._is_checked = True


def _leaves(output: torch.Tensor) -> set[int]:
    """The ids of the leaves that an output depends on."""
    todo = [] if output.grad_fn is None else [output.grad_fn]
    seen, leaves = set(todo), {id(output)} if output.grad_fn is None else set()
    while todo:
        node = todo.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(id(variable))
        fresh = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= fresh
        todo += fresh
    return leaves

"""A stage's forward, backward and update, in terms of DeepSpeed's pipeline engine (runtime.stage.SplitCompute).

DeepSpeed keeps a micro-batch in a slot of ``engine.pipe_buffers`` between its forward and its backward.
"""

from __future__ import annotations

from functools import cached_property

import torch

from paci_schedule.adapters.deepspeed.split import SplitBackward
from paci_schedule.adapters.deepspeed.stage_local import StageLocalEngine
from paci_schedule.runtime.message import Payload

__all__ = ["EngineCompute"]


class EngineCompute:
    """The engine's stage, as the StageRunner drives it.

    Args:
        engine: computes the micro-batches and applies the updates.
    """

    def __init__(self, engine: StageLocalEngine) -> None:
        self._engine = engine
        self._free: list[int] = []
        self._slots: dict[int, int] = {}
        self._graphs: dict[int, torch.Tensor] = {}
        self._losses: dict[int, torch.Tensor] = {}
        self._put_off: dict[int, tuple[torch.Tensor, ...]] = {}

    def forward(self, micro_batch: int, inputs: Payload | None) -> Payload | None:
        engine, slot = self._engine, self._take_slot(micro_batch)
        if engine.is_first_stage() or engine.is_last_stage():
            engine._exec_load_micro_batch(slot)
        if inputs is not None:
            for tensor in _tensors(inputs):
                tensor.requires_grad_(tensor.is_floating_point())
            engine.pipe_buffers["inputs"][slot] = inputs
        engine._exec_forward_pass(slot)
        if not engine.is_last_stage():
            return engine.pipe_buffers["outputs"][slot]
        additional = engine.module.get_additional_losses() or {}
        self._graphs[micro_batch] = engine.loss
        self._losses[micro_batch] = torch.stack([loss.detach().float() for loss in (engine.loss, *additional.values())])
        return None

    def backward(self, micro_batch: int, gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        engine, slot = self._engine, self._slots[micro_batch]
        inputs, outputs = engine.pipe_buffers["inputs"][slot], engine.pipe_buffers["outputs"][slot]
        if engine.is_last_stage():
            engine.loss = self._graphs.pop(micro_batch)
        else:
            engine.grad_layer = gradients if isinstance(outputs, tuple) else gradients[0]
        # A first stage without parameters has nothing to differentiate.
        if engine.is_last_stage() or any(tensor.requires_grad for tensor in _tensors(outputs)):
            engine._exec_backward_pass(slot)
        engine.grad_layer = None
        self._release(micro_batch)
        if engine.is_first_stage():
            return ()
        floating = [tensor for tensor in _tensors(inputs) if tensor.is_floating_point()]
        return tuple(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in floating)

    def backward_input(self, micro_batch: int, gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        engine = self._engine
        if engine.is_first_stage():  # it has no inputs that take gradients: its whole backward is that of its weights
            self._put_off[micro_batch] = gradients
            return ()
        slot = self._slots[micro_batch]
        outputs = [tensor for tensor in _tensors(engine.pipe_buffers["outputs"][slot]) if tensor.is_floating_point()]
        # DeepSpeed's hooks on the outputs would divide the last stage's gradients once more than the loss below.
        managers = [manager for tensor in outputs for manager in getattr(tensor, "_backward_hook_managers", ())]
        assert managers, "DeepSpeed keeps the hooks on its outputs somewhere else"
        for manager in managers:
            manager.remove_hooks()
        if engine.is_last_stage():
            outputs = [self._graphs.pop(micro_batch) / engine.gradient_accumulation_steps()]
        inputs = [tensor for tensor in _tensors(engine.pipe_buffers["inputs"][slot]) if tensor.is_floating_point()]
        self._split.inputs(micro_batch, outputs, None if engine.is_last_stage() else list(gradients), inputs)
        return tuple(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in inputs)

    def backward_weight(self, micro_batch: int) -> None:
        if self._engine.is_first_stage():
            self.backward(micro_batch, self._put_off.pop(micro_batch))
            return
        self._split.weights(micro_batch)
        self._release(micro_batch)

    def losses(self, micro_batch: int) -> torch.Tensor:
        return self._losses.pop(micro_batch)

    def step(self, update: int, losses: torch.Tensor) -> None:
        self._engine.take_update(losses)

    def post_sum(self, tie: int) -> None:
        self._engine.post_sum(tie)

    def _take_slot(self, micro_batch: int) -> int:
        if not self._free:
            self._free.append(len(self._slots))
            self._engine._reserve_pipe_buffers(len(self._slots) + 1)
        self._slots[micro_batch] = self._free.pop()
        return self._slots[micro_batch]

    def _release(self, micro_batch: int) -> None:
        slot = self._slots.pop(micro_batch)
        for buffers in self._engine.pipe_buffers.values():
            buffers[slot] = None
        self._free.append(slot)

    @cached_property
    def _split(self) -> SplitBackward:
        return SplitBackward(self._engine)


def _tensors(payload: Payload) -> tuple[torch.Tensor, ...]:
    return payload if isinstance(payload, tuple) else (payload,)

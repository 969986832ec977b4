"""DeepSpeed's own Adams as predictions step them; these optimizers count their steps in their own ways.

The source is deepspeed/ops/adam.

* FusedAdam, its default on a GPU, counts in the state of the last parameter of a group, and steps all by that count.
* DeepSpeedCPUAdam, its default with offloading, has an object in C++ (csrc/includes/cpu_adam.h, `IncrementStep`) that
  multiplies up the powers of the betas, step by step.  A step with the number of the one before changes nothing there.
  So a prediction of the next step, however often it is made, leaves that step as it would have been, bit for bit, as
  long as all parameters are at the same step.  One of the step after it would not.  FusedAdam has it on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch.optim import Optimizer

from paci_schedule.core.drift import drift_bound
from paci_schedule.core.spec import PipelineSpec

__all__ = ["stepped_as", "why_not_ahead"]


def stepped_as(optimizer: Optimizer) -> Optimizer:
    """The optimizer as `paci_schedule.predict` knows it: itself, or another class with the same state."""
    face = {FusedAdam: _FusedAdam, DeepSpeedCPUAdam: _CPUAdam}.get(type(optimizer))
    if face is None:
        return optimizer
    other = object.__new__(face)
    other.__dict__ = optimizer.__dict__
    return other


def why_not_ahead(optimizer: Optimizer, spec: PipelineSpec) -> Iterator[str]:
    """Why predictions would change what this optimizer does later; nothing where they do not."""
    groups, name = optimizer.param_groups, type(optimizer).__name__
    on_host = isinstance(optimizer, FusedAdam) and not any(p.is_cuda for group in groups for p in group["params"])
    if not (isinstance(optimizer, DeepSpeedCPUAdam) or on_host):
        return
    ahead = drift_bound(spec, 0)
    if ahead > 1:
        yield (
            f"{name} with {spec.accumulation} micro-batches an update on {spec.stages} stages: a prediction may be "
            f"{ahead} updates ahead, and its kernel, which multiplies up the betas from step to step, would lose "
            f'count; accumulate at least {spec.look_ahead(0)}, or use torch.optim\'s Adam ("torch_adam": true)'
        )
    if len({tuple(group["betas"]) for group in groups}) > 1:
        yield (
            f"{name} with betas that differ between parameter groups: its kernel, which multiplies them up from step "
            'to step for all groups, would lose count; use the same betas, or torch.optim\'s Adam ("torch_adam": true)'
        )


def _expected(
    group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor, decoupled: bool
) -> torch.Tensor | None:
    """The first moment, its bias corrected, without a decay in the gradient; None before the first step."""
    if not state.get("step"):
        return None
    bias = 1 - group["betas"][0] ** state["step"] if group["bias_correction"] else 1.0
    mean = state["exp_avg"] / bias
    return mean if decoupled else mean.sub_(weight, alpha=group["weight_decay"])


class _FusedAdam(FusedAdam):
    def expected_gradient(
        self, group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor
    ) -> torch.Tensor | None:
        return _expected(group, state, weight, bool(self.adam_w_mode))

    def state_of(self, group: Mapping[str, Any], parameter: torch.Tensor) -> Mapping[str, Any]:
        state = self.state.get(parameter, {})
        counting = (self.state[other] for other in reversed(group["params"]) if self.state.get(other))
        return {**state, "step": next(counting)["step"]} if state else state


class _CPUAdam(DeepSpeedCPUAdam):
    def expected_gradient(
        self, group: Mapping[str, Any], state: Mapping[str, Any], weight: torch.Tensor
    ) -> torch.Tensor | None:
        return _expected(group, state, weight, self.adam_w_mode)

    def __del__(self) -> None:
        """The object in C++ is the optimizer's."""

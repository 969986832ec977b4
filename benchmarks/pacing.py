"""Ops that take a fixed time, so that any machine shows what a schedule does."""

from __future__ import annotations

import time
from typing import Any

import torch

__all__ = ["Pace"]


class Pace(torch.autograd.Function):
    """The identity, in `forward` seconds; its gradient, in `backward` seconds."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradient, None, None

"""What gradients are scaled with where they are clipped, to the bit as DeepSpeed does in fp32."""

from __future__ import annotations

import torch

__all__ = ["clip_factor"]


def clip_factor(limit: float, norm: torch.Tensor) -> torch.Tensor:
    """What gradients in fp32 are multiplied with, fp32[], so that their norm is at most `limit`."""
    # One tensor by another, as DeepSpeed divides: a Python number by a tensor is rounded differently.
    return torch.clamp(torch.full_like(norm, limit) / (norm + 1e-6), max=1.0)

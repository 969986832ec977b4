"""The factor by which gradients are clipped, to the bit as DeepSpeed computes it in fp32."""

from __future__ import annotations

import torch

__all__ = ["clip_factor"]


def clip_factor(limit: float, norm: torch.Tensor) -> torch.Tensor:
    """The factor, fp32[], by which gradients in fp32 are multiplied so that their norm is at most `limit`."""
    # DeepSpeed divides one tensor by another; a Python number divided by a tensor is rounded differently.
    return torch.clamp(torch.full_like(norm, limit) / (norm + 1e-6), max=1.0)

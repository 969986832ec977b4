"""Copies of many tensors with few kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["copied", "write"]


def copied(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fresh tensors with the same values."""
    fresh = [torch.empty_like(tensor, requires_grad=False) for tensor in tensors]
    write(fresh, tensors)
    return fresh


@torch.no_grad()
def write(targets: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy the values into the targets in place.  Autograd does not see it: no version counter moves."""
    if targets:
        torch._foreach_copy_([target.data for target in targets], list(values))

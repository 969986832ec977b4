"""A batch's way from the host to the device, on which the host never waits for the device.

A copy from pageable memory holds the host until the device has reached it, behind everything that is queued there.  A
copy from pinned memory is queued like any other op, and the host goes on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

__all__ = ["upload"]


def upload(batch: Any, device: torch.device) -> Any:
    """Queue the copy of a batch to the device, on the current stream.

    Args:
        batch: a tensor, or tuples, lists and dictionaries of tensors; what is no tensor stays as it is.
        device: where the tensors shall be.

    Returns:
        The batch with its tensors on `device`; those that are there already are not copied.
    """

    if isinstance(batch, torch.Tensor):  # nearly always; walking a tree of one leaf takes many times as long
        return _queued(batch, device)
    return tree_map_only(torch.Tensor, lambda tensor: _queued(tensor, device), batch)


def _queued(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()  # a copy by the host, into memory that the allocator keeps for the next one
    return tensor.to(device, non_blocking=True)

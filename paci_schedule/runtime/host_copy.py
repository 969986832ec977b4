"""Small tensors on their way to the host, which nobody has to wait for."""

from __future__ import annotations

import torch

__all__ = ["HostCopy"]


class HostCopy:
    """A small tensor on its way to the host.

    Args:
        tensor: on any device; may change after construction.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = tensor.clone()

    def has_arrived(self) -> bool:
        return self._arrived is None or self._arrived.query()

    def numbers(self) -> list[float]:
        """The values; waits for the copy if it is still under way."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()

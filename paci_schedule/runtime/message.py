"""One message between two stages: tensors of known shapes, packed into one contiguous buffer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Layout", "Payload"]

Payload = torch.Tensor | tuple[torch.Tensor, ...]
"""What travels in one message: a tensor, or a tuple of tensors (also of one)."""

_ALIGN = 16  # bytes, so that every part can be viewed in any dtype


@dataclass(frozen=True)
class Layout:
    """Shapes and dtypes of the tensors of a message, in order.

    Attributes:
        parts: shape and dtype of each tensor.
        bare: the payload is a tensor, not a tuple.
    """

    parts: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    bare: bool

    @classmethod
    def of(cls, payload: Payload) -> Layout:
        """The layout that fits `payload`."""
        bare = isinstance(payload, torch.Tensor)
        tensors = (payload,) if bare else payload
        return cls(tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors), bare)

    def __str__(self) -> str:
        return ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in self.parts)

    def pack(self, payload: Payload) -> torch.Tensor:
        """The payload as one contiguous uint8 tensor; without a copy if it is a single contiguous tensor."""
        if isinstance(payload, torch.Tensor):
            return payload.detach().contiguous().flatten().view(torch.uint8)
        buffer = self.empty(payload[0].device)
        for view, tensor in zip(self._views(buffer), payload, strict=True):
            view.copy_(tensor.detach())
        return buffer

    def empty(self, device: torch.device) -> torch.Tensor:
        """An uninitialised buffer for such a message, uint8[bytes], on `device`."""
        shape, dtype = self.parts[-1]
        return torch.empty(self._offsets()[-1] + math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=device)

    def unpack(self, buffer: torch.Tensor) -> Payload:
        """The payload in `buffer`, as views of it."""
        views = self._views(buffer)
        return views[0] if self.bare else tuple(views)

    def _offsets(self) -> list[int]:
        offsets = [0]
        for shape, dtype in self.parts[:-1]:
            end = offsets[-1] + math.prod(shape) * dtype.itemsize
            offsets.append(-(-end // _ALIGN) * _ALIGN)
        return offsets

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        return [
            buffer[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for offset, (shape, dtype) in zip(self._offsets(), self.parts, strict=True)
        ]

"""One message between two stages: tensors of known shapes, packed into one contiguous buffer."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch

from paci_schedule.errors import UnsupportedError

__all__ = ["HEADER", "Layout", "Payload", "Riders"]

HEADER = 1 << 14
"""Bytes of a header: a layout in a message of known size."""

Payload = torch.Tensor | tuple[torch.Tensor, ...]
"""What a stage hands to its neighbour: a tensor, or a tuple of tensors (also of one)."""

Riders = tuple[torch.Tensor, ...]
"""Small tensors that travel with a payload: losses, norms."""

_ALIGN = 16  # bytes, so that every part can be viewed in any dtype


@dataclass(frozen=True)
class Layout:
    """Shapes and dtypes of the tensors of a message, in order.

    Attributes:
        parts: shape and dtype of each tensor of the payload, then of each rider.
        riders: how many of the parts are riders.
        bare: the payload is a tensor, not a tuple.
    """

    parts: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    riders: int
    bare: bool

    @classmethod
    def of(cls, payload: Payload, riders: Riders = ()) -> Layout:
        """The layout that fits."""
        parts = tuple((tuple(tensor.shape), tensor.dtype) for tensor in _tensors(payload, riders))
        return cls(parts, len(riders), isinstance(payload, torch.Tensor))

    @classmethod
    def from_header(cls, header: torch.Tensor) -> Layout:
        """The layout that such a header holds."""
        parts, riders, bare = json.loads(header.numpy().tobytes().rstrip(b"\0"))
        return cls(tuple((tuple(shape), getattr(torch, dtype)) for dtype, *shape in parts), riders, bare)

    def header(self) -> torch.Tensor:
        """This layout as uint8[HEADER], on the host.

        Raises:
            UnsupportedError: it does not fit.
        """
        parts = [[_name(dtype), *shape] for shape, dtype in self.parts]
        written = json.dumps([parts, self.riders, self.bare], separators=(",", ":")).encode()
        if len(written) > HEADER:
            raise UnsupportedError(
                f"{len(self.parts)} tensors between two stages: their shapes take {len(written)} bytes, more than "
                f"{HEADER}; pack them into fewer tensors"
            )
        padded = bytearray(written.ljust(HEADER, b"\0"))
        return torch.frombuffer(padded, dtype=torch.uint8)

    def __str__(self) -> str:
        parts = [f"{_name(dtype)}{list(shape)}" for shape, dtype in self.parts]
        payload, riders = parts[: len(parts) - self.riders], parts[len(parts) - self.riders :]
        shown = payload[0] if self.bare else f"a tuple ({', '.join(payload)})"
        return f"{shown} with losses and norms in {', '.join(riders)}" if riders else shown

    def pack(self, payload: Payload, riders: Riders = ()) -> torch.Tensor:
        """The message as one contiguous uint8 tensor; without a copy if it is a single contiguous tensor."""
        tensors = _tensors(payload, riders)
        if len(tensors) == 1:
            return tensors[0].detach().contiguous().flatten().view(torch.uint8)
        buffer = self.empty(tensors[0].device)
        for view, tensor in zip(self._views(buffer), tensors, strict=True):
            view.copy_(tensor.detach())
        return buffer

    def empty(self, device: torch.device) -> torch.Tensor:
        """An uninitialised buffer for such a message, uint8[bytes], on `device`."""
        shape, dtype = self.parts[-1]
        return torch.empty(self._offsets()[-1] + math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=device)

    def unpack(self, buffer: torch.Tensor) -> tuple[Payload, Riders]:
        """The message in `buffer`: the payload as views of it, the riders as copies, which may outlive it."""
        views = self._views(buffer)
        split = len(views) - self.riders
        payload = views[0] if self.bare else tuple(views[:split])
        return payload, tuple(view.clone() for view in views[split:])

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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(payload: Payload, riders: Riders) -> tuple[torch.Tensor, ...]:
    return (*((payload,) if isinstance(payload, torch.Tensor) else payload), *riders)

"""Numbers that stand for the shapes of data, so that a batch can be announced before anything of it is computed."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

__all__ = ["ShapeNumbers"]


class ShapeNumbers:
    """Numbers for shapes: equal shapes have equal numbers, until they are forgotten.

    Attributes:
        lowest: the lowest number in use.
    """

    def __init__(self) -> None:
        self.lowest = 0
        self._numbers: dict[Hashable, int] = {}

    def number(self, *data: Any) -> int:
        """The number for the shapes and dtypes of tensors in tuples, lists and dictionaries; all else is alike."""
        return self._numbers.setdefault(_shapes(data), self.lowest + len(self._numbers))

    def forget(self) -> None:
        """Begin with new numbers, as what stages make of the same shapes will be another thing."""
        self.lowest += len(self._numbers)
        self._numbers.clear()


def _shapes(data: Any) -> Hashable:
    if isinstance(data, torch.Tensor):
        return data.shape, data.dtype
    if isinstance(data, (tuple, list)):
        return tuple(map(_shapes, data))
    if isinstance(data, dict):
        return tuple((name, _shapes(value)) for name, value in data.items())
    return None

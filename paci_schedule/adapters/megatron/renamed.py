"""The settings and the state of a job under the names that Megatron-LM's arguments have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["Renamed"]


class Renamed:
    """Reads like Megatron-LM's arguments.  A value that is set is set in all parts that have one.

    Args:
        parts: what has the settings as attributes; the first that has one is read.
        others: the names of Megatron-LM's arguments that are others in these parts.
        absent: the values of those that have no counterpart.
    """

    def __init__(self, parts: Sequence[Any], others: Mapping[str, str], absent: Mapping[str, Any]) -> None:
        vars(self).update(_parts=parts, _others=others, _absent=absent)
        vars(self)["_given"] = []  # before each setting: the part, the name, the value

    def __getattr__(self, name: str) -> Any:
        there = self._others.get(name, name)
        for part in self._parts:
            if hasattr(part, there):
                return getattr(part, there)
        if name in self._absent:
            return self._absent[name]
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        for part in self._parts:
            if hasattr(part, name):
                self._given.append((part, name, getattr(part, name)))
                setattr(part, name, value)

    @contextmanager
    def as_given(self) -> Iterator[None]:
        """While it lasts, the settings are the user's own, for frameworks write them into every checkpoint."""
        ours = [(part, name, getattr(part, name)) for part, name, _ in self._given]
        for part, name, value in reversed(self._given):
            setattr(part, name, value)
        try:
            yield
        finally:
            for part, name, value in ours:
                setattr(part, name, value)

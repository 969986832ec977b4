"""Who calls the schedule: the frames of the training loop, where it keeps its state in no global."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["calling", "locals_of"]


def locals_of(module: str, function: str) -> dict[str, Any] | None:
    """The local variables of a function that calls; None where it does not, or its module was never imported.

    Args:
        module: where it is defined.
        function: its name there, that of a method after its class: "Trainer.train_step".
    """
    found: Any = sys.modules.get(module)
    for name in function.split("."):
        found = getattr(found, name, None)
    code = getattr(found, "__code__", None)
    return next((frame.f_locals for frame in _frames() if frame.f_code is code), None)


def calling(*modules: str) -> str | None:
    """The full name of the innermost function that calls out of these modules, or of their parts; None without one."""
    for frame in _frames():
        module = frame.f_globals.get("__name__", "")
        if any(f"{module}.".startswith(f"{each}.") for each in modules):
            return f"{module}.{frame.f_code.co_name}"
    return None


def _frames() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back

"""Putting a function in the place of another one, wherever a module knows that by name."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["rebind"]


def rebind(stock: Any, ours: Any) -> list[tuple[str, str]]:
    """Give `ours` every name of an imported module that stands for `stock`.

    Returns:
        the modules that had it, and under which name.
    """
    found = [
        (importer, name)
        for importer, module in list(sys.modules.items())
        for name, value in list(getattr(module, "__dict__", {}).items())
        if value is stock
    ]
    for importer, name in found:
        setattr(sys.modules[importer], name, ours)
    return found

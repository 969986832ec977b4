"""Putting a function in the place of another one: wherever a module or a class has it by name."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from types import CellType, FrameType, FunctionType, ModuleType
from typing import Any

__all__ = ["keepers", "rebind"]


def rebind(stock: Any, ours: Any) -> list[tuple[str, str]]:
    """Give `ours` every name of an imported module or of a class that stands for `stock`.

    Returns:
        the modules and classes that had it, and under which name.
    """
    found = []
    for importer, module in list(sys.modules.items()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is stock:
                setattr(module, name, ours)
                found.append((importer, name))
    for owner in [each for each in gc.get_objects() if issubclass(type(each), type)]:  # no property __class__ is asked
        for name, value in list(vars(owner).items()):
            if value is stock or (isinstance(value, staticmethod) and value.__func__ is stock):
                setattr(owner, name, ours if value is stock else staticmethod(ours))
                found.append((_full_name(owner), name))
    return found


def keepers(stock: Any) -> list[str]:
    """What has `stock` where `rebind` does not reach it, and would go on calling it: default values, closures, partial
    functions, attributes of objects, and containers that a module has by name."""
    gc.collect()  # what nothing leads to any more calls nothing
    return sorted({place for holder in _referrers(stock) for place in _places(holder)})


def _places(holder: Any) -> Iterator[str]:
    """Where one finds what refers to the function; nothing where that cannot be told."""
    if isinstance(holder, functools.partial):
        yield f"a functools.partial of {_full_name(holder.func)}"
    elif isinstance(holder, CellType):
        for closure in _referrers(holder):
            yield from (f"the closure of {_full_name(each)}" for each in _referrers(closure, FunctionType))
    elif isinstance(holder, tuple | list | dict | set):
        for owner in _referrers(holder):
            if isinstance(owner, FunctionType) and (holder is owner.__defaults__ or holder is owner.__kwdefaults__):
                yield f"a default value of {_full_name(owner)}"
            elif isinstance(owner, dict):
                modules = [each for each in _referrers(owner, ModuleType) if vars(each) is owner]
                yield from (f"{each.__name__}.{name}" for each in modules for name in owner if owner[name] is holder)
            elif getattr(owner, "__dict__", None) is holder and not isinstance(owner, ModuleType | type | FunctionType):
                yield f"an attribute of an object of {_full_name(type(owner))}"
    elif not isinstance(holder, ModuleType | type | FunctionType | staticmethod):
        yield f"an attribute of an object of {_full_name(type(holder))}"


def _referrers(value: Any, kind: type = object) -> list[Any]:
    found = [(each, type(each)) for each in gc.get_referrers(value)]
    return [each for each, its in found if issubclass(its, kind) and its is not FrameType]


def _full_name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"

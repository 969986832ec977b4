"""Stand-ins for packages that a project imports at module level without asking whether they are there."""

from __future__ import annotations

import builtins
from types import ModuleType
from typing import Any

__all__ = ["install"]


class _Anything:
    """Takes any arguments; as a decorator it leaves the function alone."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else _Anything()

    def __class_getitem__(cls, item: Any) -> type:
        return cls


class _StandIn(ModuleType):
    """A package in which every name is there: those that begin with a capital letter are classes."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        there = type(name, (_Anything,), {}) if name[0].isupper() else _StandIn(name)
        setattr(self, name, there)
        return there

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Anything()(*args, **kwargs)


def install(project: str, absent: tuple[str, ...], with_all_parts: tuple[str, ...]) -> None:
    """Give stand-ins to one project alone: whoever else asks finds nothing, and does without.

    Args:
        project: the beginning of the names of its modules.
        absent: the modules that are given to it.
        with_all_parts: the packages of which everything is given to it.
    """
    stock = builtins.__import__

    def import_it(name: str, names: Any = None, local: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        try:
            return stock(name, names, local, fromlist, level)
        except ModuleNotFoundError:
            asks = (names or {}).get("__name__", "").startswith(project)
            if asks and not level and (name in absent or name.startswith(with_all_parts)):
                return _StandIn(name)
            raise

    builtins.__import__ = import_it

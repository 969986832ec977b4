"""A stand-in for triton, which newer Megatron imports at module level; on the CPU no kernel of it is ever called."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

__all__ = ["install"]

_MODULES = (
    "triton",
    "triton.language",
    "triton.language.extra",
    "triton.language.math",
    "triton.testing",
    "triton.runtime",
    "triton.compiler",
)


class _Anything:
    """Answers to every name, call and subscript; as a decorator it leaves the function alone."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else _Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __getitem__(self, item: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __add__ = __radd__ = __mul__ = __rmul__ = __or__


class _Module(types.ModuleType):
    __version__ = "3.4.0"
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


def install() -> None:
    """Put the stand-in where triton would be, unless it is installed."""
    if importlib.util.find_spec("triton") is not None:
        return
    for name in _MODULES:
        module = _Module(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    triton = sys.modules["triton"]
    triton.jit = triton.heuristics = _decorator
    triton.autotune = _decorator
    triton.cdiv = lambda a, b: -(-a // b)
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()


def _decorator(function: Any = None, *_: Any, **__: Any) -> Any:
    return function if callable(function) else (lambda inner: inner)

"""What Megatron-Bridge imports at module level without asking whether it is there, for a machine that has none of it.

``python -m testing.megatron_cpu testing.bridge_cpu MODULE ARGUMENTS...`` is as ``python -m MODULE``, on the CPU.
"""

from __future__ import annotations

import builtins
import runpy
import sys
from types import ModuleType
from typing import Any

_ABSENT = ("transformer_engine", "transformer_engine.pytorch", "nvidia_resiliency_ext.inprocess")
_ABSENT_WITH_ALL_PARTS = ("megatron.energon", "webdataset", "qwen_vl_utils", "timm", "open_clip", "torchvision")


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


def install() -> None:
    """Give stand-ins to Megatron-Bridge alone: whoever else asks finds nothing, and does without."""
    stock = builtins.__import__

    def import_it(name: str, names: Any = None, local: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        try:
            return stock(name, names, local, fromlist, level)
        except ModuleNotFoundError:
            asks = (names or {}).get("__name__", "").startswith("megatron.bridge")
            if asks and not level and (name in _ABSENT or name.startswith(_ABSENT_WITH_ALL_PARTS)):
                return _StandIn(name)
            raise

    builtins.__import__ = import_it


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

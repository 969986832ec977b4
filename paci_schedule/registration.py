"""Which frameworks are installed, and telling each of them about the schedule."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from paci_schedule.errors import UnsupportedError

__all__ = ["installed", "register_installed"]

_ADAPTERS = {"deepspeed": "deepspeed", "megatron": "megatron.core"}  # adapter -> the package that it is for


def installed() -> list[str]:
    """The adapters whose framework can be imported."""
    return [adapter for adapter, package in _ADAPTERS.items() if _exists(package)]


def register_installed() -> None:
    """Register with every supported framework that is installed.

    Raises:
        UnsupportedError: none is installed, or one is in a version that is not supported.
    """
    adapters = installed()
    if not adapters:
        raise UnsupportedError(
            "no supported framework is installed: pip install 'paci-schedule[deepspeed]' or 'paci-schedule[megatron]'"
        )
    for adapter in adapters:
        import_module(f"paci_schedule.adapters.{adapter}").register()


def _exists(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it lies in
        return False

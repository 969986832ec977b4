"""Which frameworks are installed, and telling each of them about the schedule."""

from __future__ import annotations

from importlib.util import find_spec

from paci_schedule.errors import UnsupportedError

__all__ = ["register_installed"]


def register_installed() -> None:
    """Register with every supported framework that is installed.

    Raises:
        UnsupportedError: none is installed, or one is in a version that is not supported.
    """
    if find_spec("deepspeed") is None:
        raise UnsupportedError("no supported framework is installed: pip install 'paci-schedule[deepspeed]'")
    from paci_schedule.adapters import deepspeed

    deepspeed.register()

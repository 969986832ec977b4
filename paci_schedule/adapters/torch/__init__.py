"""torch.distributed.pipelining: ``SchedulePaci`` beside ``Schedule1F1B``, and ``get_schedule_class("paci")``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paci_schedule.adapters.torch.hooks import probe

if TYPE_CHECKING:
    from paci_schedule.adapters.torch.schedule import SchedulePaci

__all__ = ["SchedulePaci", "probe", "register"]


def register(options: Mapping[str, Any] | None = None) -> None:
    """Let ``torch.distributed.pipelining`` find the schedule by its name, for torchtitan's config.  Idempotent.

    Modules that have imported ``get_schedule_class`` by name get the new one under that name.  A training script that
    constructs `SchedulePaci` itself needs no registration.

    Args:
        options: of every schedule that is found by its name, as keyword arguments of `SchedulePaci`; None for those
            that an earlier call has set.

    Raises:
        ConfigError: an option that the rules do not allow.
        UnsupportedError: a hook in torch that we rely on is gone.
    """
    from paci_schedule.adapters.torch.dispatch import install

    install(options)


def __getattr__(name: str) -> Any:
    if name == "SchedulePaci":  # imported when it is asked for, as torch's module takes seconds
        from paci_schedule.adapters.torch.schedule import SchedulePaci

        return SchedulePaci
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

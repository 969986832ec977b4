"""The schedules that a config may name."""

from __future__ import annotations

from paci_schedule.errors import ConfigError, nearest

__all__ = ["SCHEDULES", "check_schedule"]

SCHEDULES = ("1f1b", "paci")
"""The framework's own schedule, and ours."""


def check_schedule(name: object, said: str) -> str:
    """`name`, if it is a schedule's.

    Args:
        name: what the config holds.
        said: how the config says it, for the error.

    Raises:
        ConfigError: an unknown name, with the nearest valid one.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"{said}: unknown; valid are {nearest(str(name), SCHEDULES)}")
    return name

"""The schedules that a config may name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paci_schedule.core.schedules.registry import SCHEDULES, schedule
from paci_schedule.errors import ConfigError, UnsupportedError, nearest

__all__ = ["IN_EVERY_LOOP", "RUNNABLE", "check_choice"]

RUNNABLE = tuple(name for name in SCHEDULES if not schedule(name).cannot_run)
"""What an engine that owns the optimizer step can run."""

IN_EVERY_LOOP = tuple(name for name in RUNNABLE if name == "1f1b" or "leading" in schedule(name).options)
"""What also runs in a training loop that steps the optimizer itself: the loop's own schedule, and those whose calls can
end for every stage after the same backward."""


def check_choice(name: Any, written: str, valid: Sequence[str] = RUNNABLE) -> str:
    """`name`, if it is a schedule's that can be run.

    Args:
        name: what the config holds.
        written: how the user wrote it, for the error.
        valid: the names that can be run there.

    Raises:
        ConfigError: an unknown name, with the nearest valid one.
        UnsupportedError: a schedule that cannot be run there, with the reason.
    """
    listed = nearest(str(name), valid)
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ConfigError(f"{written}: unknown; valid are {listed}")
    if name in valid:
        return name
    reason = schedule(name).cannot_run or (
        "is not among the schedules of this framework, whose training loop steps the optimizer itself, and it has no "
        "calls that lead"
    )
    raise UnsupportedError(f"{written}: cannot be run, since the schedule {reason}; valid are {listed}")

"""The options of the schedule as keyword arguments of `SchedulePaci`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paci_schedule.adapters.options import LaggingOptions, read

__all__ = ["PaciOptions"]


@dataclass(frozen=True, kw_only=True)
class PaciOptions(LaggingOptions):
    """The keyword arguments that every framework has."""

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> PaciOptions:
        """The options among the keyword arguments of a schedule.  Raises ConfigError as `options.read` does."""
        return read(cls, given, f"SchedulePaci(**{given!r})", lambda name, value: f"SchedulePaci({name}={value})")

"""How long a neighbouring stage may be waited for."""

from __future__ import annotations

__all__ = ["LONGEST", "is_timeout"]

LONGEST = 30 * 24 * 3600
"""Seconds.  What hands a timeout on (timedelta, the transports' milliseconds) knows no infinity."""


def is_timeout(value: object) -> bool:
    """Whether a config's value is a number of seconds greater than 0 and at most `LONGEST`."""
    return type(value) in (int, float) and 0 < value <= LONGEST

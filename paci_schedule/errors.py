"""The exceptions of paci_schedule.  Every message names the value, the rule it breaks and the remedy.

PaciError
├── ConfigError (ValueError)         a value in a config or a spec that the rules do not allow
├── UnsupportedError                 a feature, version or topology that PACI does not run with
├── ScheduleError                    a stream of ops that is not a valid pipeline schedule
├── DataEndedError (StopIteration)   the data iterator ended before a whole batch
├── NonfiniteError (ArithmeticError) a loss, an activation or a weight that is infinite or no number
├── CheckpointError (RuntimeError)   a checkpoint that could not be saved, or is not as it was saved
└── LinkError (RuntimeError)         another stage, or a replica, did not answer in time, or is gone
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataEndedError",
    "LinkError",
    "NonfiniteError",
    "PaciError",
    "ScheduleError",
    "UnsupportedError",
]


class PaciError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(PaciError, ValueError):
    """A value that the rules do not allow."""


class UnsupportedError(PaciError):
    """Something that cannot run under PACI (yet), refused before training starts."""


class ScheduleError(PaciError):
    """A stream of ops that is not a valid pipeline schedule."""


class DataEndedError(PaciError, StopIteration):
    """The data ended before a whole batch could be read.  A ``StopIteration``, as DeepSpeed's own loop raises."""


class NonfiniteError(PaciError, ArithmeticError):
    """A loss, an activation, a gradient or a weight that is infinite or no number, where the job asked to be told."""


class CheckpointError(PaciError, RuntimeError):
    """A checkpoint that could not be saved, or that is not as it was saved."""


class LinkError(PaciError, RuntimeError):
    """Another stage, or a replica of this one, did not answer in time, or its process is gone.

    Attributes:
        ranks: the global ranks that were waited for; empty if nobody was.
    """

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


def nearest(value: str, valid: Iterable[str]) -> str:
    """Names in `valid`, the likeliest one first suggested: ``"'paci', '1f1b'; did you mean 'paci'?"``."""
    names = {name.lower(): name for name in sorted(valid)}
    listed = ", ".join(repr(name) for name in names.values())
    close = difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.5)
    return f"{listed}; did you mean {names[close[0]]!r}?" if close else listed

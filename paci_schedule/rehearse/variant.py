"""One side of a comparison: a schedule with a prediction."""

from __future__ import annotations

from dataclasses import dataclass

from paci_schedule.core.staleness import check_reach, interval_of
from paci_schedule.errors import ConfigError, nearest
from paci_schedule.rehearse.run import REHEARSABLE, check_warmup

__all__ = ["Variant"]

_DEFAULTS = ("off", "1", "0")  # of a prediction, its reach and the updates that are flushed, as they are written


@dataclass(frozen=True)
class Variant:
    """A schedule, and for PACI when and how far it predicts the weights of stale forwards, and how many of the first
    updates are flushed, as `rehearse` takes them.

    Raises:
        ConfigError: the schedule, the prediction, the reach or the number of updates is unknown.
    """

    schedule: str
    prediction: str | int = "off"
    prediction_reach: float = 1.0
    flush_warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in REHEARSABLE:
            raise ConfigError(f"schedules={self.schedule!r}: must be one of {nearest(self.schedule, REHEARSABLE)}")
        interval_of(self.prediction)
        check_reach(self.prediction_reach, self.prediction)
        check_warmup(self.flush_warmup_steps, self.schedule)

    @classmethod
    def parse(cls, schedule: str, prediction: str) -> Variant:
        """Parse the prediction of a command line, where a reach may follow a colon, and then the number of the first
        updates that are flushed, as in "every:1.5:40"."""
        parts = prediction.split(":")
        try:
            when, reach, steps = [*parts, *_DEFAULTS[len(parts) :]]
            far, flushed = float(reach), int(steps)
        except ValueError:
            raise ConfigError(
                f"prediction={prediction!r}: must be a prediction, a reach and a number of updates, as in "
                "'every', 'every:1.5' or 'every:1.5:40'"
            ) from None
        return cls(schedule, int(when) if when.isdecimal() else when, far, flushed)

    @property
    def when(self) -> str:
        """The prediction, as `parse` reads it."""
        parts = [str(self.prediction), f"{self.prediction_reach:g}", str(self.flush_warmup_steps)]
        while len(parts) > 1 and parts[-1] == _DEFAULTS[len(parts) - 1]:
            parts.pop()
        return ":".join(parts)

"""One side of a comparison: a schedule with a prediction."""

from __future__ import annotations

from dataclasses import dataclass

from paci_schedule.core.staleness import check_reach, interval_of
from paci_schedule.errors import ConfigError, nearest
from paci_schedule.rehearse.run import REHEARSABLE

__all__ = ["Variant"]


@dataclass(frozen=True)
class Variant:
    """A schedule, and for PACI when and how far it predicts the weights of stale forwards, as `rehearse` takes them.

    Raises:
        ConfigError: the schedule, the prediction or the reach is unknown.
    """

    schedule: str
    prediction: str | int = "off"
    prediction_reach: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in REHEARSABLE:
            raise ConfigError(f"schedules={self.schedule!r}: must be one of {nearest(self.schedule, REHEARSABLE)}")
        interval_of(self.prediction)
        check_reach(self.prediction_reach, self.prediction)

    @classmethod
    def parse(cls, schedule: str, prediction: str) -> Variant:
        """Parse the prediction of a command line, where a reach may follow a colon, as in "every:1.5"."""
        when, _, reach = prediction.partition(":")
        try:
            far = float(reach or 1)
        except ValueError:
            raise ConfigError(f"prediction={prediction!r}: {reach!r} must be a number, as in 'every:1.5'") from None
        return cls(schedule, int(when) if when.isdecimal() else when, far)

    @property
    def when(self) -> str:
        """The prediction, as `parse` reads it."""
        return f"{self.prediction}" + ("" if self.prediction_reach == 1 else f":{self.prediction_reach:g}")

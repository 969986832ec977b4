"""The table of all schedules, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MappingProxyType

from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.schedules.dual_pipe_v import DualPipeV
from paci_schedule.core.schedules.gpipe import GPipe
from paci_schedule.core.schedules.interleaved import Interleaved
from paci_schedule.core.schedules.interleaved_zero_bubble import InterleavedZeroBubble
from paci_schedule.core.schedules.one_f_one_b import OneFOneB
from paci_schedule.core.schedules.paci import Paci
from paci_schedule.core.schedules.pipedream import PipeDream
from paci_schedule.core.schedules.pipedream_2bw import PipeDream2BW
from paci_schedule.core.schedules.zero_bubble import ZeroBubble
from paci_schedule.core.schedules.zero_bubble_v import ZeroBubbleV
from paci_schedule.errors import ConfigError, nearest

__all__ = ["SCHEDULES", "schedule"]

SCHEDULES: MappingProxyType[str, Callable[..., Schedule]] = MappingProxyType(
    {
        "gpipe": GPipe,
        "1f1b": OneFOneB,
        "interleaved-1f1b": Interleaved,
        "zb-h1": partial(ZeroBubble, 1),
        "zb-h2": partial(ZeroBubble, 2),
        "zb-v": ZeroBubbleV,
        "interleaved-zb": InterleavedZeroBubble,
        "dualpipev": DualPipeV,
        "pipedream": PipeDream,
        "pipedream-2bw": PipeDream2BW,
        "paci": Paci,
    }
)


def schedule(name: str, **options: object) -> Schedule:
    """The schedule called `name`.

    Args:
        name: one of `SCHEDULES`.
        options: arguments of the schedule: `chunks` of interleaved-1f1b, `leading` of paci.

    Raises:
        ConfigError: there is no such schedule, or it has no such option.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule={name!r}: must be one of {nearest(name, SCHEDULES)}")
    try:
        return SCHEDULES[name](**options)
    except TypeError:
        listed = ", ".join(f"{option}={value!r}" for option, value in options.items())
        takers = [f"{taker} takes {option}" for option in options for taker in SCHEDULES if _takes(taker, option)]
        raise ConfigError(
            f"{listed}: not an option of the {name} schedule; leave it out" + f" ({', '.join(takers)})" * bool(takers)
        ) from None


def _takes(name: str, option: str) -> bool:
    return option in SCHEDULES[name]().options

"""Several schedules and predictions on one text: at equal tokens, and at equal ideal time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.rehearse.run import REHEARSABLE
from paci_schedule.rehearse.text import Text
from paci_schedule.rehearse.trial import Settings, Trial, run
from paci_schedule.rehearse.variant import Variant

__all__ = ["Comparison", "batches_of", "compare", "slots", "variants"]


@dataclass(frozen=True)
class Comparison:
    """One schedule with one prediction.

    Attributes:
        equal_tokens: the run that sees as much data as all others.
        equal_time: the run that takes as long as all others, if all stages are equally long and a prediction costs
            nothing; the same run for a schedule without a bubble.  Its learning rate comes down over its own length.
    """

    equal_tokens: Trial
    equal_time: Trial


def variants(spec: PipelineSpec, schedules: Sequence[str], predictions: Sequence[str]) -> list[Variant]:
    """Every schedule, and "paci" with every prediction.

    Raises:
        ConfigError: there is no such schedule or prediction, or it does not exist for this pipeline.
    """
    asked = [Variant.parse("paci", each) for each in predictions]
    found = [each for name in schedules for each in (asked if name == "paci" else [Variant(name)])]
    for each in found:
        REHEARSABLE[each.schedule].schedule.check(spec)
    return found


def slots(schedule: str, settings: Settings) -> float:
    """How long a batch takes at best, in forwards and backwards of a micro-batch: a, and with a flush a + P - 1."""
    bubble = settings.stages - 1 if REHEARSABLE[schedule].schedule.flushes else 0
    return settings.accumulation + bubble


def batches_of(schedule: str, settings: Settings) -> int:
    """Batches that the schedule takes in the ideal time that one without a bubble takes for all of them; at least 1."""
    return max(1, round(settings.updates * settings.accumulation / slots(schedule, settings)))


def compare(settings: Settings, text: Text, asked: Sequence[Variant], tick: Callable[[], None]) -> list[Comparison]:
    """Run what `variants` has given; `tick` is called once a batch."""
    found = []
    for variant in asked:
        whole = run(settings, text, variant, settings.updates, tick)
        fewer = batches_of(variant.schedule, settings)
        part = whole if fewer == settings.updates else run(settings, text, variant, fewer, tick)
        found.append(Comparison(whole, part))
    return found

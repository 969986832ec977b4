"""A comparison of schedules and predictions on one text: at equal tokens, and at equal ideal time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.rehearse.run import REHEARSABLE
from paci_schedule.rehearse.text import Text
from paci_schedule.rehearse.trial import Settings, Trial, run
from paci_schedule.rehearse.variant import Variant

__all__ = ["Comparison", "batches_of", "compare", "ends", "variants"]


@dataclass(frozen=True)
class Comparison:
    """The two runs of one schedule with one prediction.

    Attributes:
        equal_tokens: the run that sees as much data as all others.
        equal_time: the run that would take as long as all others if all stages took equally long and a prediction cost
            nothing.  Its learning rate decays over its own length.  Without a bubble it is the same run.
    """

    equal_tokens: Trial
    equal_time: Trial


def variants(spec: PipelineSpec, schedules: Sequence[str], predictions: Sequence[str]) -> list[Variant]:
    """Every schedule once, and "paci" once with every prediction.

    Raises:
        ConfigError: a schedule or prediction is unknown, or cannot run on this pipeline.
    """
    asked = [Variant.parse("paci", each) for each in predictions]
    found = [each for name in schedules for each in (asked if name == "paci" else [Variant(name)])]
    for each in found:
        REHEARSABLE[each.schedule].schedule.check(spec)
    return found


def ends(variant: Variant, settings: Settings, batches: int) -> list[int]:
    """The least time at which each of so many batches is done, in forwards plus backwards of a micro-batch.

    A batch takes a of them, and with a flush a + P - 1.
    """
    flushed = batches if REHEARSABLE[variant.schedule].schedule.flushes else variant.flush_warmup_steps
    bubble = settings.stages - 1
    return [number * settings.accumulation + min(number, flushed) * bubble for number in range(1, batches + 1)]


def batches_of(variant: Variant, settings: Settings) -> int:
    """How many batches the variant can do while a schedule without a bubble does all of them; at least 1."""
    time = settings.updates * settings.accumulation
    return max(1, sum(end <= time for end in ends(variant, settings, settings.updates)))


def compare(settings: Settings, text: Text, asked: Sequence[Variant], tick: Callable[[], None]) -> list[Comparison]:
    """Run each of the variants, which `variants` returns; `tick` is called once for every batch."""
    found = []
    for variant in asked:
        whole = run(settings, text, variant, settings.updates, tick)
        fewer = batches_of(variant, settings)
        part = whole if fewer == settings.updates else run(settings, text, variant, fewer, tick)
        found.append(Comparison(whole, part))
    return found

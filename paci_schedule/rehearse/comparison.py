"""A comparison of schedules and predictions on one text: at equal tokens, and at equal ideal time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.rehearse.run import REHEARSABLE
from paci_schedule.rehearse.text import Text
from paci_schedule.rehearse.trial import Settings, Trial, run
from paci_schedule.rehearse.variant import Variant

__all__ = ["Comparison", "batches_of", "compare", "ideal_time", "variants"]


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


def ideal_time(variant: Variant, spec: PipelineSpec, batches: int) -> int:
    """The least time of the first so many batches, in forwards plus backwards of a micro-batch.

    A batch takes a of them, and with a flush a + P - 1.
    """
    flushed = batches if REHEARSABLE[variant.schedule].schedule.flushes else min(batches, variant.flush_warmup_steps)
    return batches * spec.accumulation + flushed * (spec.stages - 1)


def batches_of(variant: Variant, settings: Settings) -> int:
    """How many batches the variant can do while a schedule without a bubble does all of them; at least 1."""
    time = settings.updates * settings.accumulation
    return max(1, sum(ideal_time(variant, settings.spec, each) <= time for each in range(1, settings.updates + 1)))


def compare(settings: Settings, text: Text, asked: Sequence[Variant], tick: Callable[[], None]) -> list[Comparison]:
    """Run each of the variants, which `variants` returns; `tick` is called once for every batch."""
    found = []
    for variant in asked:
        whole = run(settings, text, variant, settings.updates, tick)
        fewer = batches_of(variant, settings)
        part = whole if fewer == settings.updates else run(settings, text, variant, fewer, tick)
        found.append(Comparison(whole, part))
    return found

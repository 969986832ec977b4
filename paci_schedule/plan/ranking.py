"""The order of a plan's rows, what each is compared with, and which of them are worth a line.

A speed is predicted to within a few percent at best, so a team would not choose by the last of them.  Rows within 1% of
the fastest of their group count as equally fast.  Among them those come first in which fewer micro-batches drift, then
those that take less memory on the fullest stage, then those that leave more of it on all stages together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from paci_schedule.plan.job import DATA_PARALLEL, Row

__all__ = ["ALIKE", "SLOWER", "compared", "lines", "ranked"]

ALIKE = 0.99
"""Speeds whose ratio is at least this count as equal."""

SLOWER = "slower than another row of its schedule and division"
"""How the reason of a refusal begins that says nothing about what can run."""

_MEMORY = 2**30 / 10  # what a plan prints of it


def ranked(rows: Iterable[Row]) -> list[Row]:
    """The rows that can run, the one to choose first, and then the refused ones."""
    rows = list(rows)
    running = sorted((row for row in rows if not row.refused), key=lambda row: -row.tokens_per_second)
    ordered: list[Row] = []
    while running:
        least = ALIKE * running[0].tokens_per_second
        alike = [row for row in running if row.tokens_per_second >= least]
        ordered += sorted(alike, key=_preference)
        running = running[len(alike) :]
    return ordered + sorted((row for row in rows if row.refused), key=lambda row: row.memory)


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with their speeds relative to the fastest row of 1F1B, and to the fastest one without a bubble.

    These rows obey the same limits, and may divide the devices and the batch in any other way.
    """

    def fastest(belongs: Callable[[str], bool]) -> float:
        return max((row.tokens_per_second for row in rows if belongs(row.schedule)), default=0.0)

    flushed = fastest(lambda name: name in ("1f1b", DATA_PARALLEL))
    without_bubble = fastest(lambda name: name.startswith("zb-"))
    return [
        row
        if row.refused
        else replace(
            row,
            against_1f1b=row.tokens_per_second / flushed if flushed else None,
            against_zero_bubble=row.tokens_per_second / without_bubble if without_bubble else None,
        )
        for row in rows
    ]


def lines(rows: Iterable[Row]) -> list[list[Row]]:
    """The ranked rows that can run, as a plan prints them: rows that nothing but their schedule tells apart are one
    line, and of a schedule's rows with the same division of the devices only the first is shown."""
    seen: set[tuple[object, ...]] = set()
    first = []
    for row in rows:
        place = row.schedule, row.stages, row.slices, row.replicas
        if not row.refused and place not in seen:
            seen.add(place)
            first.append(row)
    return [list(alike) for _, alike in groupby(first, key=_figures)]


def _preference(row: Row) -> tuple[float, ...]:
    """The key by which rows of the same speed are sorted."""
    memory = round(row.memory / _MEMORY)
    return round(row.drifted, 9), memory, -row.headroom, -row.tokens_per_second, sum(row.extra_in_flight)


def _figures(row: Row) -> tuple[object, ...]:
    shape = row.stages, row.slices, row.replicas, row.micro_batch_size, row.recompute, row.extra_in_flight
    speed = float(f"{row.tokens_per_second:.6g}")
    return *shape, speed, round(row.memory / _MEMORY), row.drift, round(row.drifted, 6)

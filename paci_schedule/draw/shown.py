"""The part of a timeline that is drawn, with the weight versions that its ops run with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from paci_schedule.core.ops import OpKind
from paci_schedule.simulate.timeline import Span, Timeline

__all__ = ["shortest_op", "shown", "versions"]


def versions(row: Sequence[Span], stashes: bool = False) -> Iterator[tuple[Span, int, int]]:
    """For every span of a stage: the span, the version that it runs with, and the version of its micro-batch's F.

    Args:
        row: the stage's spans.
        stashes: a backward runs with the version of its forward.
    """
    version, at_forward = next((span.op.index for span in row if span.op.kind is OpKind.STEP), 0), {}
    for span in row:
        key = span.op.index, span.op.chunk
        if span.op.kind is OpKind.FORWARD:
            at_forward[key] = version
        older = at_forward.get(key, version) if span.op.kind is not OpKind.STEP else version
        yield span, older if stashes else version, older
        version += span.op.kind is OpKind.STEP


def shown(timeline: Timeline) -> list[list[tuple[Span, int, int]]]:
    """The `versions` of the spans that are drawn, for every stage."""
    begin = timeline.shown_from
    return [
        [each for each in versions(row, timeline.stashes) if each[0].start >= begin < each[0].end]
        for row in timeline.rows
    ]


def shortest_op(timeline: Timeline) -> float:
    """The median time of the shortest kind of op; updates do not count."""
    lengths: dict[OpKind, list[float]] = {}
    for row in shown(timeline):
        for span, *_ in row:
            if span.op.kind is not OpKind.STEP and span.end > span.start:
                lengths.setdefault(span.op.kind, []).append(span.end - span.start)
    return min(map(median, lengths.values()), default=1.0)

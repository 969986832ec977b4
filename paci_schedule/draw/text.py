"""Timelines as text and Chrome traces, and the colours of `picture.py`.

Colour is the version of the stage's weights that an op runs with, its depth the kind of op: light F, full B, dark W.
A B whose weights are newer than those of its F begins with a stripe in the colour of the older ones, so that drift is
visible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm
from statistics import median
from typing import TYPE_CHECKING

from paci_schedule.core.ops import OpKind
from paci_schedule.simulate.timeline import Span, Timeline

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["HUES", "STEP", "chrome_trace", "colour", "shortest_op", "shown", "text", "versions"]

HUES = (
    (0.27, 0.51, 0.71),
    (0.90, 0.55, 0.22),
    (0.35, 0.63, 0.36),
    (0.72, 0.36, 0.53),
    (0.55, 0.47, 0.33),
    (0.20, 0.62, 0.62),
)
_DEPTH = {
    OpKind.FORWARD: 0.45,
    OpKind.BACKWARD: 1.0,
    OpKind.WEIGHT: 1.35,
}  # below 1 is towards white, above towards black
STEP = (0.15, 0.15, 0.15)
_MOST_COLUMNS = 12  # of the shortest op
_WIDEST = 100_000  # characters of a line of text


def versions(row: Sequence[Span]) -> Iterator[tuple[Span, int, int]]:
    """For every span of a stage: the span, the updates done before it, and those done before its micro-batch's F."""
    version, at_forward = next((span.op.index for span in row if span.op.kind is OpKind.STEP), 0), {}
    for span in row:
        key = span.op.index, span.op.chunk
        if span.op.kind is OpKind.FORWARD:
            at_forward[key] = version
        yield span, version, at_forward.get(key, version) if span.op.kind is not OpKind.STEP else version
        version += span.op.kind is OpKind.STEP


def shown(timeline: Timeline) -> list[list[tuple[Span, int, int]]]:
    """The `versions` of what is to be drawn of every stage."""
    begin = timeline.shown_from
    return [[each for each in versions(row) if each[0].start >= begin < each[0].end] for row in timeline.rows]


def text(timeline: Timeline, width: int | None = None) -> Text:
    """The timeline as aligned text: a column is a unit of time, `.` is waiting, `|` an update that takes hardly any.

    Args:
        timeline: what to draw.
        width: characters after which a line is cut off; None: 100,000.
    """
    from rich.text import Text

    unit, width = _unit(timeline), _WIDEST if width is None else width
    rows = shown(timeline)
    cell = 1 + max((len(str(span.op)) for row in rows for span, *_ in row if not _is_mark(span, unit)), default=1)
    drawn = Text()
    for stage, row in enumerate(rows):
        line, at = Text(f"stage {stage:<3} "), 0
        for span, version, older in row:
            if at * cell > width:
                break
            if _is_mark(span, unit):
                line.right_crop(1)
                line.append("|")
                continue
            start, end = (round(min((moment - timeline.start) / unit, at + width)) for moment in (span.start, span.end))
            line.append(".".ljust(cell) * (start - at))
            at, columns = max(start, at), max(1, end - max(start, at))
            label = str(span.op)[: columns * cell - 1].ljust(columns * cell - 1, "-" if columns > 1 else " ")
            line.append(label, style=_style(span, version, older))
            line.append(" ")
            at += columns
        line.truncate(width, overflow="ellipsis")
        drawn.append(line).append("\n")
    drawn.rstrip()
    return drawn


def chrome_trace(timelines: Mapping[str, Timeline]) -> dict[str, object]:
    """Timelines (title -> timeline, its times in seconds) as a Chrome trace for Perfetto (ui.perfetto.dev).

    A timeline is a process, a stage a thread.
    """
    events: list[dict[str, object]] = []
    for process, (title, timeline) in enumerate(timelines.items()):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}})
        for stage, row in enumerate(timeline.rows):
            at = {"pid": process, "tid": stage}
            events.append({"ph": "M", "name": "thread_name", **at, "args": {"name": f"stage {stage}"}})
            events += ({"ph": "X", **at, **event} for event in _slices(row, timeline.start))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _slices(row: Sequence[Span], origin: float) -> Iterator[dict[str, object]]:
    """What a Chrome trace says of the ops of one stage; microseconds."""
    names = {OpKind.FORWARD: "forward", OpKind.BACKWARD: "backward", OpKind.WEIGHT: "weight", OpKind.STEP: "step"}
    for span, version, older in versions(row):
        yield {
            "name": str(span.op),
            "cat": names[span.op.kind],
            "ts": (span.start - origin) * 1e6,
            "dur": (span.end - span.start) * 1e6,
            "args": {"version": version, "drift": version - older},
        }


def colour(kind: OpKind, version: int) -> tuple[float, float, float]:
    """The colour of an op that runs with this version."""
    if kind is OpKind.STEP:
        return STEP
    depth = _DEPTH[kind]
    return tuple(1 - (1 - part) * depth if depth < 1 else part / depth for part in HUES[version % len(HUES)])


def _style(span: Span, version: int, older: int) -> str:
    """The terminal style of an op; a backward with drift is underlined."""
    red, green, blue = (round(255 * part) for part in colour(span.op.kind, version))
    front = "black" if span.op.kind is OpKind.FORWARD else "white"
    return f"{front} on rgb({red},{green},{blue})" + (" underline" if version > older else "")


def _unit(timeline: Timeline) -> float:
    """The longest time of which every start and end is a multiple; where that makes wide grids, `shortest_op`."""
    spans = [span for row in shown(timeline) for span, *_ in row if span.end > span.start]
    moments = {
        Fraction(moment - timeline.start).limit_denominator(1000) for span in spans for moment in (span.start, span.end)
    } - {Fraction(0)}
    shortest = shortest_op(timeline)
    if not moments:
        return shortest
    below = lcm(*(moment.denominator for moment in moments))
    exact = gcd(*(int(moment * below) for moment in moments)) / below
    return exact if shortest <= _MOST_COLUMNS * exact else shortest


def shortest_op(timeline: Timeline) -> float:
    """The time of the shortest kind of op, updates aside: the median of its ops."""
    lengths: dict[OpKind, list[float]] = {}
    for row in shown(timeline):
        for span, *_ in row:
            if span.op.kind is not OpKind.STEP and span.end > span.start:
                lengths.setdefault(span.op.kind, []).append(span.end - span.start)
    return min(map(median, lengths.values()), default=1.0)


def _is_mark(span: Span, unit: float) -> bool:
    """True for an update that is too short for a column."""
    return span.op.kind is OpKind.STEP and span.end - span.start < unit / 2

"""Timelines as text; `colours.py` says what the colours mean."""

from __future__ import annotations

from fractions import Fraction
from math import gcd, lcm
from typing import TYPE_CHECKING

from paci_schedule.core.ops import OpKind
from paci_schedule.draw.colours import colour
from paci_schedule.draw.shown import shortest_op, shown
from paci_schedule.simulate.timeline import Span, Timeline

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["text"]

_MOST_COLUMNS = 12  # of the shortest op
_WIDEST = 100_000  # characters of a line of text


def text(timeline: Timeline, width: int | None = None) -> Text:
    """The timeline as aligned text: a column is a unit of time, `.` is waiting, and `|` is a very short update.

    Args:
        timeline: what to draw.
        width: the number of characters at which a line is cut off; None means 100,000.
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


def _style(span: Span, version: int, older: int) -> str:
    """The terminal style of an op; a backward with drift is underlined."""
    red, green, blue = (round(255 * part) for part in colour(span.op.kind, version))
    front = "black" if span.op.kind is OpKind.FORWARD else "white"
    return f"{front} on rgb({red},{green},{blue})" + (" underline" if version > older else "")


def _unit(timeline: Timeline) -> float:
    """The longest time that divides every start and end; `shortest_op` where that would make the grid too wide."""
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


def _is_mark(span: Span, unit: float) -> bool:
    """True for an update that is too short for a column."""
    return span.op.kind is OpKind.STEP and span.end - span.start < unit / 2

"""Timelines as SVG, PNG and GIF, and the file of any picture; `colours.py` says what the colours mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.draw.animation import animate
from paci_schedule.draw.chrome import chrome_trace
from paci_schedule.draw.colours import IDLE, STEP, colour
from paci_schedule.draw.dark import follow_the_reader
from paci_schedule.draw.legend import legend
from paci_schedule.draw.shown import shortest_op, shown
from paci_schedule.draw.text import text
from paci_schedule.errors import ConfigError
from paci_schedule.simulate.timeline import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["picture"]

_MOST_OPS, _MOST_ROWS = 50_000, 200  # more take minutes, and nobody sees them
_WIDEST = 13.0  # inches: 1,250 pixels of a browser
_PER_INCH = 13  # characters
_FORMATS = (".svg", ".png", ".gif", ".json", ".txt")


def picture(
    timelines: Mapping[str, Timeline], path: Path, unit: str = "", captions: Mapping[str, tuple[str, str]] | None = None
) -> None:
    """Write timelines, one below the other on one time axis, to an SVG, PNG, GIF, Chrome trace or text file.

    Args:
        timelines: title -> timeline.
        path: the file to write; its ending decides the format.
        unit: the unit of the axis.
        captions: title -> what to say beside it, and what its longest wait is; with them, what one saves is labelled.

    Raises:
        ConfigError: the ending belongs to no known format, the file cannot be written, or there is too much to draw.
    """
    if path.suffix not in _FORMATS:
        raise ConfigError(f"output={str(path)!r}: the ending says the format; use one of {', '.join(_FORMATS)}")
    try:
        if path.suffix == ".json":
            path.write_text(json.dumps(chrome_trace(timelines)))
        elif path.suffix == ".txt":
            path.write_text(
                "\n\n".join(f"{title}\n{text(timeline).plain}" for title, timeline in timelines.items()) + "\n"
            )
        else:
            _draw(timelines, path, unit, captions)
    except OSError as error:
        raise ConfigError(
            f"output={str(path)!r}: {error.strerror}; name a file in a folder that can be written"
        ) from None


def _draw(
    timelines: Mapping[str, Timeline], path: Path, unit: str, captions: Mapping[str, tuple[str, str]] | None
) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [row for timeline in timelines.values() for row in shown(timeline)]
    ops = [span.op for row in rows for span, *_ in row]
    if len(ops) > _MOST_OPS or len(rows) > _MOST_ROWS:
        raise ConfigError(
            f"{len(ops)} ops in {len(rows)} rows: a picture shows at most {_MOST_OPS} in {_MOST_ROWS}; draw fewer, "
            "or a .json for Perfetto"
        )
    longest = max(timeline.makespan for timeline in timelines.values()) or 1.0
    shortest = min(shortest_op(timeline) for timeline in timelines.values())
    characters = 0.5 + max((len(_label(op)) for op in ops), default=1)
    inches = min(_WIDEST, max(8.5, characters * longest / shortest / _PER_INCH))
    heights = [0.5 + 0.32 * len(timeline.rows) for timeline in timelines.values()]
    with rc_context({"svg.hashsalt": "paci", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(inches, sum(heights) + 1.0), layout="constrained")
        axes = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for ax, (title, timeline) in zip(axes, timelines.items(), strict=True):
            for stage, row in enumerate(shown(timeline)):
                _draw_row(ax, stage, row, timeline.start, character=longest / inches / _PER_INCH)
            caption, wait = (captions or {}).get(title, ("", ""))
            if caption:
                _label_wait(ax, timeline, wait, character=longest / inches / _PER_INCH)
                _label_saved(ax, timeline, longest, character=longest / inches / _PER_INCH)
            ax.set_title(title + (f": {caption}" if caption else ""), loc="left", fontsize=10)
            ax.set(yticks=range(len(timeline.rows)), ylim=(len(timeline.rows) - 0.5, -0.5), xlim=(0, longest))
            ax.set_yticklabels([f"stage {stage}" for stage in range(len(timeline.rows))])
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
        axes[-1].set_xlabel(f"time ({unit})" if unit else "time")
        legend(figure, timelines)
        if path.suffix == ".gif":
            animate(figure, list(axes), timelines, path)
            return
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    if path.suffix == ".svg":
        path.write_text(follow_the_reader(path.read_text()))


def _draw_row(ax: Axes, stage: int, row: Sequence[tuple[Span, int, int]], origin: float, character: float) -> None:
    """Draw one stage: a bar for every op, with its label if that fits, on a bar for the whole time of the stage."""
    if not row:
        return
    begin, end = row[0][0].start, row[-1][0].end
    ax.broken_barh([(begin - origin, end - begin)], (stage - 0.4, 0.8), facecolors=IDLE)
    bars, colours, stripes, stripe_colours = [], [], [], []
    for span, version, older in row:
        start, length = span.start - origin, span.end - span.start
        label = _label(span.op)
        bars.append((start, length))
        colours.append(colour(span.op.kind, version))
        if version > older and span.op.kind is not OpKind.STEP:
            stripes.append((start, length / 5))
            stripe_colours.append(colour(OpKind.BACKWARD, older))
        if span.op.kind is OpKind.STEP:
            ax.plot([start + length] * 2, [stage - 0.45, stage + 0.45], color=STEP, linewidth=1.2)
        elif length >= character * len(label):
            white = span.op.kind is not OpKind.FORWARD
            ax.text(
                start + length / 2,
                stage,
                label,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if white else "#1c1c1c",
                clip_on=True,
            )
    ax.broken_barh(bars, (stage - 0.4, 0.8), facecolors=colours, edgecolors="white", linewidth=0.5)
    ax.broken_barh(stripes, (stage - 0.4, 0.8), facecolors=stripe_colours, linewidth=0)


def _label(op: Op) -> str:
    """The label of an op in a picture: its micro-batch, with a prime for chunk 1."""
    return str(op.index) + "'" * op.chunk


def _label_wait(ax: Axes, timeline: Timeline, word: str, character: float) -> None:
    """Name the longest wait of a stage between two of its ops, if the word fits."""
    gaps = [
        (after.start - before.end, before.end - timeline.start, stage)
        for stage, row in enumerate(shown(timeline))
        for (before, *_), (after, *_) in pairwise(row)
    ]
    length, begin, stage = max(gaps, default=(0.0, 0.0, 0))
    if length > character * len(word):
        ax.text(begin + length / 2, stage, word, ha="center", va="center", fontsize=8, style="italic")


def _label_saved(ax: Axes, timeline: Timeline, longest: float, character: float) -> None:
    """An arrow from the end of the work to where the slowest of the pictures ends."""
    said, end = f"{longest - timeline.makespan:g} saved", timeline.makespan
    if longest - end > character * (len(said) + 2):
        middle = (len(timeline.rows) - 1) / 2
        ax.annotate(
            "", (longest, middle), (end + character / 2, middle), arrowprops={"arrowstyle": "<->", "color": "#888888"}
        )
        ax.text((longest + end) / 2, middle - 0.15, said, ha="center", va="bottom", fontsize=9)

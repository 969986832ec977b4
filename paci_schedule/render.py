"""Timelines as text, pictures and Chrome traces.

Colour is the version of the stage's weights that an op runs with, its depth the kind of op: light F, full B, dark W.
A B whose weights are newer than those of its F begins with a stripe in the colour of the older ones, so that drift is
visible.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm
from pathlib import Path
from typing import TYPE_CHECKING

from paci_schedule.errors import ConfigError
from paci_schedule.ops import OpKind
from paci_schedule.timeline import Span, Timeline

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["chrome_trace", "picture", "text", "versions"]

_HUES = (
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
_STEP = (0.15, 0.15, 0.15)
_MOST_COLUMNS = 12  # of the shortest op
_FORMATS = (".svg", ".png", ".json", ".txt")


def versions(row: Sequence[Span]) -> Iterator[tuple[Span, int, int]]:
    """For every span of a stage: the span, the updates done before it, and those done before its micro-batch's F."""
    version, at_forward = 0, {}
    for span in row:
        key = span.op.index, span.op.chunk
        if span.op.kind is OpKind.FORWARD:
            at_forward[key] = version
        yield span, version, at_forward.get(key, version) if span.op.kind is not OpKind.STEP else version
        version += span.op.kind is OpKind.STEP


def text(timeline: Timeline, width: int | None = None) -> Text:
    """The timeline as aligned text: a column is a unit of time, `.` is waiting, `|` an update that takes no time.

    Args:
        timeline: what to draw.
        width: characters after which a line is cut off; None: never.
    """
    from rich.text import Text

    unit = _unit(timeline)
    cell = 1 + max((len(str(span.op)) for row in timeline.rows for span in row if span.end > span.start), default=1)
    drawn = Text()
    for stage, row in enumerate(timeline.rows):
        line, at = Text(f"stage {stage:<3} "), 0
        for span, version, older in versions(row):
            start, end = (round((moment - timeline.start) / unit) for moment in (span.start, span.end))
            if span.op.kind is OpKind.STEP and end <= max(start, at):
                line.right_crop(1)
                line.append("|")
                continue
            line.append(".".ljust(cell) * (start - at))
            at, columns = max(start, at), max(1, end - max(start, at))
            label = str(span.op)[: columns * cell - 1].ljust(columns * cell - 1, "-" if columns > 1 else " ")
            line.append(label, style=_style(span, version, older))
            line.append(" ")
            at += columns
        if width is not None:
            line.truncate(width, overflow="ellipsis")
        drawn.append(line).append("\n")
    drawn.rstrip()
    return drawn


def chrome_trace(timeline: Timeline) -> dict[str, object]:
    """The timeline, its times in seconds, as a Chrome trace for Perfetto (ui.perfetto.dev) or chrome://tracing."""
    scale = 1e6
    names = {OpKind.FORWARD: "forward", OpKind.BACKWARD: "backward", OpKind.WEIGHT: "weight", OpKind.STEP: "step"}
    events: list[dict[str, object]] = []
    for stage, row in enumerate(timeline.rows):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": stage, "args": {"name": f"stage {stage}"}})
        for span, version, older in versions(row):
            events.append(
                {
                    "ph": "X",
                    "name": str(span.op),
                    "cat": names[span.op.kind],
                    "pid": 0,
                    "tid": stage,
                    "ts": (span.start - timeline.start) * scale,
                    "dur": (span.end - span.start) * scale,
                    "args": {"version": version, "drift": version - older},
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def picture(timelines: Mapping[str, Timeline], path: Path, unit: str = "") -> None:
    """Draw timelines below each other, on one axis of time, into an SVG, PNG, Chrome trace or text file.

    Args:
        timelines: title -> timeline.  A Chrome trace holds the first one only.
        path: what to write; its ending says in which format.
        unit: the unit of the axis.

    Raises:
        ConfigError: the ending is not one of a known format, or the file cannot be written.
    """
    if path.suffix not in _FORMATS:
        raise ConfigError(f"output={str(path)!r}: the ending says the format; use one of {', '.join(_FORMATS)}")
    try:
        if path.suffix == ".json":
            path.write_text(json.dumps(chrome_trace(next(iter(timelines.values())))))
        elif path.suffix == ".txt":
            path.write_text(
                "\n\n".join(f"{title}\n{text(timeline).plain}" for title, timeline in timelines.items()) + "\n"
            )
        else:
            _draw(timelines, path, unit)
    except OSError as error:
        raise ConfigError(
            f"output={str(path)!r}: {error.strerror}; name a file in a folder that can be written"
        ) from None


def _draw(timelines: Mapping[str, Timeline], path: Path, unit: str) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    longest = max(timeline.makespan for timeline in timelines.values()) or 1.0
    ops = max(len(row) for timeline in timelines.values() for row in timeline.rows)
    inches = min(24.0, max(7.0, 0.3 * ops))
    heights = [0.5 + 0.3 * len(timeline.rows) for timeline in timelines.values()]
    with rc_context({"svg.hashsalt": "paci", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(inches, sum(heights) + 0.7), layout="constrained")
        axes = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for ax, (title, timeline) in zip(axes, timelines.items(), strict=True):
            for stage, row in enumerate(timeline.rows):
                _draw_row(ax, stage, row, timeline.start, label_from=longest / inches / 6)
            ax.set(
                title=title, yticks=range(len(timeline.rows)), ylim=(len(timeline.rows) - 0.5, -0.5), xlim=(0, longest)
            )
            ax.set_yticklabels([f"stage {stage}" for stage in range(len(timeline.rows))])
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
        axes[-1].set_xlabel(f"time ({unit})" if unit else "time")
        _legend(figure, timelines)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_row(ax: object, stage: int, row: Sequence[Span], origin: float, label_from: float) -> None:
    """One stage: a bar for every op on a bar for all its time, labelled where an op is at least `label_from` long."""
    if not row:
        return
    ax.broken_barh([(row[0].start - origin, row[-1].end - row[0].start)], (stage - 0.4, 0.8), facecolors="#f0f0f0")
    bars, colours, stripes, stripe_colours = [], [], [], []
    for span, version, older in versions(row):
        start, length = span.start - origin, span.end - span.start
        bars.append((start, length))
        colours.append(_colour(span.op.kind, version))
        if version > older and span.op.kind is not OpKind.STEP:
            stripes.append((start, length / 5))
            stripe_colours.append(_colour(OpKind.BACKWARD, older))
        if span.op.kind is OpKind.STEP:
            ax.plot([start + length] * 2, [stage - 0.45, stage + 0.45], color=_STEP, linewidth=1.2)
        elif length >= label_from:
            white = span.op.kind is not OpKind.FORWARD
            ax.text(
                start + length / 2,
                stage,
                str(span.op.index) + "'" * span.op.chunk,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if white else "black",
                clip_on=True,
            )
    ax.broken_barh(bars, (stage - 0.4, 0.8), facecolors=colours, edgecolors="white", linewidth=0.5)
    ax.broken_barh(stripes, (stage - 0.4, 0.8), facecolors=stripe_colours, linewidth=0)


def _legend(figure: object, timelines: Mapping[str, Timeline]) -> None:
    from matplotlib.patches import Patch

    kinds = {span.op.kind for timeline in timelines.values() for row in timeline.rows for span in row}
    used = [
        version
        for timeline in timelines.values()
        for row in timeline.rows
        for span, version, _ in versions(row)
        if span.op.kind is not OpKind.STEP
    ]
    names = {OpKind.FORWARD: "F", OpKind.BACKWARD: "B", OpKind.WEIGHT: "W"}
    patches = [Patch(color=_colour(kind, 0), label=name) for kind, name in names.items() if kind in kinds]
    patches += [Patch(color=_STEP, label="step"), Patch(color="#f0f0f0", label="wait")]
    patches += [
        Patch(color=_colour(OpKind.BACKWARD, version), label=f"version {version}")
        for version in range(min(max(used, default=0) + 1, len(_HUES)))
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=7)


def _colour(kind: OpKind, version: int) -> tuple[float, float, float]:
    """The colour of an op that runs with this version."""
    if kind is OpKind.STEP:
        return _STEP
    depth = _DEPTH[kind]
    return tuple(1 - (1 - part) * depth if depth < 1 else part / depth for part in _HUES[version % len(_HUES)])


def _style(span: Span, version: int, older: int) -> str:
    """The terminal style of an op; a backward with drift is underlined."""
    red, green, blue = (round(255 * part) for part in _colour(span.op.kind, version))
    front = "black" if span.op.kind is OpKind.FORWARD else "white"
    return f"{front} on rgb({red},{green},{blue})" + (" underline" if version > older else "")


def _unit(timeline: Timeline) -> float:
    """The longest time of which every start and end is a multiple; where that makes wide grids, the shortest op's
    time."""
    spans = [span for row in timeline.rows for span in row]
    moments = {
        Fraction(moment - timeline.start).limit_denominator(1000) for span in spans for moment in (span.start, span.end)
    } - {Fraction(0)}
    shortest = min((span.end - span.start for span in spans if span.end > span.start), default=1.0)
    if not moments:
        return shortest
    below = lcm(*(moment.denominator for moment in moments))
    exact = gcd(*(int(moment * below) for moment in moments)) / below
    return exact if shortest <= _MOST_COLUMNS * exact else shortest

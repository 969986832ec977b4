"""A picture that uncovers itself op by op, and says in words what drift it has come to: for talks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paci_schedule.core.ops import OpKind
from paci_schedule.draw.shown import shown
from paci_schedule.errors import ConfigError
from paci_schedule.simulate.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["animate"]

_FRAME, _DRIFT, _LAST = 350, 1400, 4000  # milliseconds: of a frame, of one that shows a new drift, and of the last one
_MOST_FRAMES = 400


def animate(figure: Figure, axes: Sequence[Axes], timelines: Mapping[str, Timeline], path: Path) -> None:
    """Write the drawn figure as a GIF, in which time goes on from op to op.

    Args:
        figure: with everything in it.
        axes: one for each timeline.
        timelines: title -> timeline.
        path: the file to write.

    Raises:
        ConfigError: there are too many ops to show one after the other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patches import Rectangle
    from PIL import Image

    moments = sorted({end for timeline in timelines.values() for end in _ends(timeline)})
    if len(moments) > _MOST_FRAMES:
        raise ConfigError(
            f"output={str(path)!r}: {len(moments)} moments, and a GIF shows at most {_MOST_FRAMES}; draw fewer "
            "micro-batches or batches"
        )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # the words below change, and nothing may move
    longest = max(timeline.makespan for timeline in timelines.values())
    covers = []
    for ax, timeline in zip(axes, timelines.values(), strict=True):
        cover = Rectangle((0, -0.5), 2 * longest, len(timeline.rows), facecolor="white", edgecolor="none", zorder=10)
        covers.append(ax.add_patch(cover))
    axes[-1].set_xlabel("")
    words = axes[-1].text(0.5, -0.3, "", transform=axes[-1].transAxes, ha="center", fontsize=11, weight="bold")
    frames, durations, said = [], [], ""
    for moment in (0.0, *moments):
        for cover in covers:
            cover.set_x(moment)
        told = max(
            (each for timeline in timelines.values() for each in _drifts(timeline) if each[0] < moment), default=None
        )
        text = "" if told is None else told[1]
        durations.append(_DRIFT if text != said else _FRAME)
        said = text
        words.set_text(text)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy()))
    durations[-1] = _LAST
    palette = frames[-1].quantize(128)  # in which every colour occurs
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)


def _ends(timeline: Timeline) -> Iterator[float]:
    return (span.end - timeline.start for row in shown(timeline) for span, *_ in row)


def _drifts(timeline: Timeline) -> Iterator[tuple[float, str]]:
    """When a backward with drift starts, and what there is to say about it."""
    for stage, row in enumerate(shown(timeline)):
        for span, version, older in row:
            if version > older and span.op.kind is OpKind.BACKWARD:
                number = span.op.index
                yield (
                    span.start - timeline.start,
                    f"stage {stage}: the forward of {number} ran with version {older}, its backward runs with "
                    f"version {version}: drift {version - older}",
                )

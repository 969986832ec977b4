"""What the colours, stripes and letters of a picture mean, drawn below it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING

from paci_schedule.core.ops import OpKind
from paci_schedule.draw.colours import HUES, IDLE, STEP, colour
from paci_schedule.draw.shown import shown
from paci_schedule.simulate.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

__all__ = ["legend"]

_KINDS = {
    OpKind.FORWARD: "forward (F)",
    OpKind.BACKWARD: "backward (B)",
    OpKind.WEIGHT: "weight gradient (W)",
}


def legend(figure: Figure, timelines: Mapping[str, Timeline]) -> None:
    """Explain what occurs in the timelines: depths in grey, then hues, then the stripe."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    spans = [each for timeline in timelines.values() for row in shown(timeline) for each in row]
    kinds = {span.op.kind for span, *_ in spans}
    used = sorted({version for span, version, _ in spans if span.op.kind is not OpKind.STEP})
    above: list[Artist] = [
        Patch(color=colour(kind, None), label=name) for kind, name in _KINDS.items() if kind in kinds
    ]
    if OpKind.WEIGHT in kinds:
        above[1].set_label("backward, gradient of the input (B)")
    above.append(Line2D([], [], color=STEP, linewidth=1.5, label="update of the stage's weights"))
    above.append(Patch(color=IDLE, label="waiting"))
    below: list[Artist] = [
        Patch(color=colour(OpKind.BACKWARD, version), label=f"version {version}") for version in used[: len(HUES)]
    ]
    handlers = {}
    drifting = next(((new, old) for span, new, old in spans if new > old and span.op.kind is not OpKind.STEP), None)
    if drifting is not None:
        stripe = Patch(label="drift: the forward ran with the stripe's version")
        handlers[stripe] = _striped(*drifting)
        below.append(stripe)
    if any(timeline.stashes for timeline in timelines.values()):
        below.append(Line2D([], [], linewidth=0, label="PipeDream: backwards on stashed weights"))
    title = "A number is a micro-batch" + (", with ' in its second chunk" if any(s.op.chunk for s, *_ in spans) else "")
    rows = max(len(above), len(below))
    pairs = zip_longest(above, below, fillvalue=Line2D([], [], linewidth=0, label=" "))
    figure.legend(
        handles=[each for pair in pairs for each in pair],  # a legend goes down its columns
        loc="outside lower center",
        ncols=rows,
        title=title,
        title_fontsize=8,
        handler_map=handlers,
        frameon=False,
        fontsize=8,
        handlelength=1.6,
        columnspacing=1.2,
    )


def _striped(version: int, older: int) -> object:
    """Draws the handle of the stripe: a backward with it."""
    from matplotlib.legend_handler import HandlerBase
    from matplotlib.patches import Rectangle

    class Striped(HandlerBase):
        def create_artists(self, legend, handle, x, y, width, height, size, transform):  # type: ignore[override]
            bar = Rectangle((x, y), width, height, color=colour(OpKind.BACKWARD, version), transform=transform)
            stripe = Rectangle((x, y), width / 4, height, color=colour(OpKind.BACKWARD, older), transform=transform)
            return [bar, stripe]

    return Striped()

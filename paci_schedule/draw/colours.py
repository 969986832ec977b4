"""The colours of drawn timelines.

The colour of an op says which version of the stage's weights the op runs with, and its depth says the kind of the op:
light for F, full for B, dark for W.  A B whose weights are newer than those of its F begins with a stripe in the colour
of the older weights, so that drift is visible.  A B that runs on stashed weights has their colour, and no stripe.
"""

from __future__ import annotations

from paci_schedule.core.ops import OpKind

__all__ = ["GREY", "HUES", "IDLE", "STEP", "colour"]

Colour = tuple[float, float, float]

HUES: tuple[Colour, ...] = (
    (0.27, 0.51, 0.71),
    (0.90, 0.55, 0.22),
    (0.35, 0.63, 0.36),
    (0.72, 0.36, 0.53),
    (0.55, 0.47, 0.33),
    (0.20, 0.62, 0.62),
)
GREY: Colour = (0.45, 0.45, 0.45)
"""In the place of a version's hue, where a legend explains the depths."""
IDLE = "#f0f0f0"
STEP = (0.15, 0.15, 0.15)
_DEPTH = {
    OpKind.FORWARD: 0.45,
    OpKind.BACKWARD: 1.0,
    OpKind.WEIGHT: 1.35,
}  # below 1 towards white, above 1 towards black


def colour(kind: OpKind, version: int | None) -> Colour:
    """The colour of an op that runs with this version; None is no version in particular."""
    if kind is OpKind.STEP:
        return STEP
    depth = _DEPTH[kind]
    hue = GREY if version is None else HUES[version % len(HUES)]
    red, green, blue = (1 - (1 - part) * depth if depth < 1 else part / depth for part in hue)
    return red, green, blue

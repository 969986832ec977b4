"""The colours of drawn timelines.

The colour of an op says which version of the stage's weights the op runs with, and its depth says the kind of the op:
light for F, full for B, dark for W.  A B whose weights are newer than those of its F begins with a stripe in the colour
of the older weights, so that drift is visible.
"""

from __future__ import annotations

from paci_schedule.core.ops import OpKind

__all__ = ["HUES", "STEP", "colour"]

HUES = (
    (0.27, 0.51, 0.71),
    (0.90, 0.55, 0.22),
    (0.35, 0.63, 0.36),
    (0.72, 0.36, 0.53),
    (0.55, 0.47, 0.33),
    (0.20, 0.62, 0.62),
)
STEP = (0.15, 0.15, 0.15)
_DEPTH = {
    OpKind.FORWARD: 0.45,
    OpKind.BACKWARD: 1.0,
    OpKind.WEIGHT: 1.35,
}  # below 1 towards white, above 1 towards black


def colour(kind: OpKind, version: int) -> tuple[float, float, float]:
    """The colour of an op that runs with this version."""
    if kind is OpKind.STEP:
        return STEP
    depth = _DEPTH[kind]
    red, green, blue = (1 - (1 - part) * depth if depth < 1 else part / depth for part in HUES[version % len(HUES)])
    return red, green, blue

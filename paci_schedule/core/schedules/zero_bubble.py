"""ZB-H1 and ZB-H2: the backward is split into input gradient (B) and weight gradient (W), and W fills the bubble.

Source: arXiv 2401.10241, section 2, the handcrafted schedules for F, B and W of the same length (ZB-1p and ZB-2p are
their memory limits).  Stage s runs ahead by k (P-1-s) forwards and puts its W off by k s micro-batches; k is 1 for H1
and 2 for H2.  P = 3, M = 5, k = 1 (`|` is the step):

    stage 0   F0 F1 F2 .  .  B0 W0 F3 B1 W1 F4 B2 W2 B3 W3 B4 W4|
    stage 1   .  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 F4 B3 W2 B4 W3 W4|
    stage 2   .  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 F4 B4 W2 W3 W4|

and k = 2, which has no bubble, at the price of 2P-1 micro-batches in flight:

    stage 0   F0 F1 F2 F3 F4 B0 W0 B1 W1 B2 W2 B3 W3 B4 W4|
    stage 1   .  F0 F1 F2 B0 F3 B1 F4 B2 W0 B3 W1 B4 W2 W3 W4|
    stage 2   .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 W0 W1 W2 W3 W4|

Whatever the costs, the bubble of a batch is (P-1) (B + max(0, F-W)) for H1 with M >= P, and (P-1) max(0, F+B-2W, B-F)
for H2 with M >= 2P-1.  With W <= F that is the paper's (P-1)(F+B-W) and, where it is positive, (P-1)(F+B-2W).  A
longer W helps no further: stage 0 waits P F and (P-1) B for its first B, and has P or 2P-1 forwards to do until then.
"""

from __future__ import annotations

from collections.abc import Iterator

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.base import Schedule, weave
from paci_schedule.core.spec import PipelineSpec

__all__ = ["ZeroBubble"]


class ZeroBubble(Schedule):
    """ZB-H1 (`depth` 1) or ZB-H2 (`depth` 2)."""

    splits_backward = True

    def __init__(self, depth: int) -> None:
        self.name = f"zb-h{depth}"
        self.depth = depth
        if depth > 1:
            self.cannot_run = "holds up to 2P - 1 micro-batches on a stage, where 1F1B and zb-h1 hold at most P"

    def batch(self, spec: PipelineSpec, stage: int) -> Iterator[Op]:
        f, b, w = (OpKind.FORWARD, 0), (OpKind.BACKWARD, 0), (OpKind.WEIGHT, 0)
        ahead, late = self.depth * (spec.stages - 1 - stage), self.depth * stage
        pattern = [f] * ahead + [f, b] * late + [f, b, w] * spec.accumulation + [w] * late
        return weave(pattern, spec.accumulation)

    def gradients_on_wire(self, spec: PipelineSpec, stage: int) -> int:
        return min(stage, 1) * self.depth

    def in_flight(self, spec: PipelineSpec, stage: int) -> int:
        return min(self.depth * (spec.stages - 1) + 1, spec.accumulation)

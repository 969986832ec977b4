"""ZB-V: two chunks a stage, folded like a V, so that the last chunk comes back to the first stage.

Source: arXiv 2401.10241, section 6.  Chunk 0 of the stages runs down the V, chunk 1 up again.  P = 2, M = 3, F, B and
W of a chunk of the same length (.1 is chunk 1, `|` the step):

    stage 0   F0   F1   F2   F0.1 B0.1 W0.1 F1.1 B1.1 W1.1 B0   W0   F2.1 B2.1 W2.1 B1   W1   B2   W2  |
    stage 1   .    F0   F0.1 F1   F1.1 B0.1 W0.1 F2   B0   W0   F2.1 B1.1 W1.1 B1   B2.1 B2   W1   W2.1 W2  |

It has no bubble where F = B = W and M >= 2P, and holds 2P chunks in flight, which is the memory of P micro-batches:
that of 1F1B's first stage, on every stage.
"""

from __future__ import annotations

from collections.abc import Iterator

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.base import Schedule, weave
from paci_schedule.core.spec import PipelineSpec

__all__ = ["ZeroBubbleV"]


class ZeroBubbleV(Schedule):
    """ZB-V."""

    name = "zb-v"
    chunks = 2
    splits_backward = True
    cannot_run = "cuts the model into two chunks a stage; an engine holds one"

    def batch(self, spec: PipelineSpec, stage: int) -> Iterator[Op]:
        down, up = ([(kind, chunk) for kind in (OpKind.FORWARD, OpKind.BACKWARD, OpKind.WEIGHT)] for chunk in (0, 1))
        (f, b, w), (f_up, b_up, w_up) = down, up
        to_turn, count = spec.stages - stage, spec.accumulation
        filled = max(count, 2 * spec.stages - 1)
        pattern = [f] * (2 * to_turn - 1) + [f_up, f] * stage + [f_up, b_up, w_up] * to_turn
        pattern += [f, b, w, f_up, b_up, w_up] * (filled - spec.stages)
        pattern += [b, b_up] * stage + [b, w] * to_turn + [w_up] * stage + [w] * filled
        return weave(pattern, count)

    def position(self, stages: int, stage: int, chunk: int) -> int:
        return 2 * stages - 1 - stage if chunk else stage

    def in_flight(self, spec: PipelineSpec, stage: int) -> int:
        return min(2 * spec.stages, 2 * spec.accumulation)

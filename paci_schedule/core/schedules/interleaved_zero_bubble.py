"""Interleaved 1F1B whose backwards are split, so that the gradients of weights fill what is left of its bubble.

Source: `ScheduleInterleavedZeroBubble` of torch.distributed.pipelining, which takes ZB-H1 (arXiv 2401.10241) to the
chunks of interleaved 1F1B.  Stage s runs its W as many turns after their B as it stands behind the first stage.
P = 2, v = 2, M = 4, F, B and W of a chunk of the same length (.1 is chunk 1, `|` the step):

    stage 0   F0   F1   F0.1 F1.1 .    B0.1 W0.1 F2   B1.1 W1.1 F3   B0   W0   F2.1 B1   W1   F3.1 B2.1 W2.1 ...
    stage 1   .    F0   F1   F0.1 B0.1 F1.1 B1.1 W0.1 F2   B0   W1.1 F3   B1   W0   F2.1 B2.1 W1   F3.1 B3.1 ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.interleaved import Interleaved
from paci_schedule.core.spec import PipelineSpec

__all__ = ["InterleavedZeroBubble"]


class InterleavedZeroBubble(Interleaved):
    """Interleaved 1F1B with split backwards, to be drawn and simulated."""

    name = "interleaved-zb"
    splits_backward = True
    planned = False

    def batch(self, spec: PipelineSpec, stage: int) -> Iterator[Op]:
        late: deque[Op] = deque()
        for op in super().batch(spec, stage):
            yield op
            if op.kind is OpKind.BACKWARD:
                late.append(op._replace(kind=OpKind.WEIGHT))
            if len(late) > stage:
                yield late.popleft()
        yield from late

    def in_flight(self, spec: PipelineSpec, stage: int) -> int:
        return min(super().in_flight(spec, stage) + stage, self.chunks * spec.accumulation)

    def _ahead(self, spec: PipelineSpec, stage: int) -> int:
        ahead = spec.stages - 1 - stage + (self.chunks - 1) * spec.stages
        return min(ahead, self.chunks * spec.accumulation)

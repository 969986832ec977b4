"""GPipe: all forwards of a batch, then all its backwards, the last micro-batch first.

Source: arXiv 1811.06965, figure 2.  P = 3 stages, M = 4 micro-batches, F and B of the same length, `|` the
step.  The bubble is that of 1F1B, (P-1)/(M+P-1) of the time, but every stage holds all M activations:

    stage 0   F0 F1 F2 F3 .  .  .  .  B3 B2 B1 B0|
    stage 1   .  F0 F1 F2 F3 .  .  B3 B2 B1 B0|
    stage 2   .  .  F0 F1 F2 F3 B3 B2 B1 B0|
"""

from __future__ import annotations

from collections.abc import Iterator

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec

__all__ = ["GPipe"]


class GPipe(Schedule):
    """All forwards, then all backwards."""

    name = "gpipe"

    def batch(self, spec: PipelineSpec, stage: int) -> Iterator[Op]:
        for index in range(spec.accumulation):
            yield Op(OpKind.FORWARD, index)
        for index in reversed(range(spec.accumulation)):
            yield Op(OpKind.BACKWARD, index)

    def in_flight(self, spec: PipelineSpec, stage: int) -> int:
        return spec.accumulation

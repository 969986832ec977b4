"""1F1B with a flush after every batch (PipeDream-Flush): what DeepSpeed and Megatron run by default.

P = 3 stages, M = 4 micro-batches a batch; `.` is the bubble, (P-1)/(M+P-1) of the time when F and B cost the same:

    stage 0   F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3  STEP
    stage 1   .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .   STEP
    stage 2   .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .   STEP

In terms of rounds 1F1B is PACI's stream, drained after every batch: the two schedules differ in nothing but the drain.
"""

from __future__ import annotations

from collections.abc import Iterator

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules import paci
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec

__all__ = ["OneFOneB", "batch", "stream"]


def batch(spec: PipelineSpec) -> paci.Segment:
    """One batch of a micro-batches, from an empty pipe to an empty pipe."""
    return paci.Segment(spec, 0, spec.accumulation + spec.look_ahead(0), spec.accumulation)


def stream(spec: PipelineSpec, stage: int, batches: int) -> Iterator[Op]:
    """The compute ops of `stage` for `batches` batches; micro-batches and updates count on from batch to batch."""
    return OneFOneB().stream(spec, stage, batches)


class OneFOneB(Schedule):
    """1F1B, flushed after every batch."""

    name = "1f1b"

    def batch(self, spec: PipelineSpec, stage: int) -> Iterator[Op]:
        return (op for op in batch(spec).ops(stage) if op.kind is not OpKind.STEP)

    def gradients_on_wire(self, spec: PipelineSpec, stage: int) -> int:
        return spec.gradients_on_wire(stage)

    def in_flight(self, spec: PipelineSpec, stage: int) -> int:
        return min(spec.in_flight(stage), spec.accumulation)

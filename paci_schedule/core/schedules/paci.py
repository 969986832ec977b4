"""PACI: each stage runs one endless 1F1B stream, steps by itself, and is never flushed between batches.

Source: arXiv 2606.07881.  P = 3 stages, a = 2 micro-batches an update; one column is one round, S a local step:

    stage 0   F0     F1     F2 B0    F3 B1 S   F4 B2    F5 B3 S   ...      looks ahead d = 2
    stage 1   F0     F1 B0  F2 B1 S  F3 B2     F4 B3 S  F5 B4     ...                  d = 1
    stage 2   F0 B0  F1 B1 S  F2 B2  F3 B3 S   F4 B4    F5 B5 S   ...                  d = 0
              `---- call 0 ----'`----- call 1 -----'`----- call 2 -----'               lagging cut

Round i of stage s is F(i), then B(i - d_s), then, after every a-th backward, STEP.  A *segment* is a run of rounds;
what a training loop calls a batch is one segment, and the cut decides where it ends:

* lagging (`train_batch`): return after every a-th forward.  d_s backwards are outstanding on return, and the STEP
  happens inside the call, wherever it falls.  A call admits exactly a micro-batches.
* leading (`lead_batch`): return after every a-th backward.  The first call runs d_s forwards more than later ones.

A *drain* is the rounds that are left when no more forwards are admitted.  Rounds and micro-batches are counted from 0
since the pipe was last empty, so a drained pipe has no hidden state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from paci_schedule.core.drift import drift_bound, drift_of
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec

__all__ = ["Paci", "Segment", "drain", "lead_batch", "segments", "stream", "train_batch"]


@dataclass(frozen=True)
class Segment:
    """A run of rounds of every stage: what one call executes.

    Attributes:
        spec: the pipeline.
        start: the first round; under the leading cut that of the last stage.
        stop: the round after the last one; likewise.
        admitted: micro-batches that the pipe has taken in by the end; no stage runs the forward of a later one.
        leading: True where a stage's rounds are shifted by its look-ahead (the leading cut).
    """

    spec: PipelineSpec
    start: int
    stop: int
    admitted: int
    leading: bool = False

    @property
    def taken(self) -> int:
        return self.admitted

    @property
    def finished(self) -> int:
        """Micro-batches of which every stage, the first one included, has done the backward by the end."""
        return self.stop if self.leading else min(self.admitted, max(0, self.stop - self.spec.look_ahead(0)))

    def rounds(self, stage: int) -> range:
        """The rounds that `stage` executes in this segment."""
        if not self.leading:
            return range(self.start, self.stop)
        ahead = self.spec.look_ahead(stage)
        return range(self.start + ahead if self.start else 0, self.stop + ahead)

    def ops(self, stage: int) -> Iterator[Op]:
        """The compute ops of `stage` in this segment: F, B and STEP, in order."""
        ahead, accumulation = self.spec.look_ahead(stage), self.spec.accumulation
        for index in self.rounds(stage):
            if index < self.admitted:
                yield Op(OpKind.FORWARD, index)
            done = index - ahead
            if 0 <= done < self.admitted:
                yield Op(OpKind.BACKWARD, done)
                if (done + 1) % accumulation == 0:
                    yield Op(OpKind.STEP, done // accumulation)


def train_batch(spec: PipelineSpec, admitted: int) -> Segment:
    """The next batch of a pipe that has taken in `admitted` micro-batches: a forwards and their paired backwards."""
    return Segment(spec, admitted, admitted + spec.accumulation, admitted + spec.accumulation)


def drain(spec: PipelineSpec, admitted: int) -> Segment:
    """The outstanding backwards of a pipe that has taken in `admitted` micro-batches, without new forwards."""
    return Segment(spec, admitted, admitted + spec.look_ahead(0), admitted)


def lead_batch(spec: PipelineSpec, finished: int, last: int | None = None) -> Segment:
    """The batch that takes every stage from `finished` to `finished` + a backwards, forwards leading.

    Args:
        spec: the pipeline.
        finished: backwards that every stage has done, a multiple of a.
        last: micro-batches that will ever be admitted, where that is known; no stage runs the forward of a later one,
            so the last calls cool down.
    """
    stop = finished + spec.accumulation
    admitted = stop + spec.look_ahead(0)
    return Segment(spec, finished, stop, admitted if last is None else min(admitted, last), leading=True)


def segments(spec: PipelineSpec, batches: int, leading: bool = False) -> Iterator[Segment]:
    """The calls of `batches` batches from an empty pipe to an empty pipe: lagging and a drain, or leading."""
    total = batches * spec.accumulation
    for admitted in range(0, total, spec.accumulation):
        yield lead_batch(spec, admitted, total) if leading else train_batch(spec, admitted)
    if not leading:
        yield drain(spec, total)


def stream(spec: PipelineSpec, stage: int, batches: int) -> Iterator[Op]:
    """The compute ops of `stage` for `batches` batches from an empty pipe, and the drain after them."""
    for segment in segments(spec, batches):
        yield from segment.ops(stage)


class Paci(Schedule):
    """PACI, whose ops are grouped into calls by the leading cut or by the lagging one."""

    name = "paci"
    flushes = False
    in_rounds = True
    options = frozenset({"leading", "extra_in_flight", "prediction"})

    def __init__(self, leading: bool = False) -> None:
        self.leading = leading

    def call(self, spec: PipelineSpec, taken: int = 0, finished: int = 0, last: int | None = None) -> Segment:
        return lead_batch(spec, finished, last) if self.leading else train_batch(spec, taken)

    def drain(self, spec: PipelineSpec, taken: int) -> Segment:
        return drain(spec, taken)

    def run(self, spec: PipelineSpec, batches: int) -> Iterator[Segment]:
        return segments(spec, batches, self.leading)

    def calls(self, spec: PipelineSpec, stage: int, batches: int) -> Iterator[Iterable[Op]]:
        return (segment.ops(stage) for segment in self.run(spec, batches))

    def in_flight(self, spec: PipelineSpec, stage: int) -> int:
        return spec.in_flight(stage)

    def gradients_on_wire(self, spec: PipelineSpec, stage: int) -> int:
        return spec.gradients_on_wire(stage)

    def drift(self, spec: PipelineSpec, stage: int, micro_batch: int) -> int:
        return drift_of(spec, stage, micro_batch)

    def drift_bound(self, spec: PipelineSpec, stage: int) -> int:
        return drift_bound(spec, stage)

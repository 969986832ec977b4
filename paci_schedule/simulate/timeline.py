"""What ran when: the compute ops of every stage with their start and end, simulated or recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from paci_schedule.core.ops import Op, OpKind

__all__ = ["Span", "Timeline", "peak_in_flight"]


class Span(NamedTuple):
    """One op, which runs from `start` to `end`."""

    op: Op
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of every stage, in order.

    Attributes:
        rows: the spans of each stage.
        calls: for each stage, how many of its spans were done at the end of each call of the training loop.
        shown_from: pictures leave out the spans that start before this time.
        stashes: a backward runs with the version of its forward, of which the stage has kept a copy.
    """

    rows: Sequence[Sequence[Span]]
    calls: Sequence[Sequence[int]] = ()
    shown_from: float = -inf
    stashes: bool = False

    @property
    def start(self) -> float:
        """When the first op of any stage starts, of those that are shown."""
        return max(self.shown_from, min((row[0].start for row in self.rows if row), default=0.0))

    @property
    def end(self) -> float:
        """When the last op of any stage ends."""
        return max((row[-1].end for row in self.rows if row), default=0.0)

    @property
    def makespan(self) -> float:
        """From the first op of any stage to the end of the last one."""
        return self.end - self.start

    def call(self, stage: int, number: int) -> Sequence[Span]:
        """The spans of one call at `stage`."""
        ends = self.calls[stage]
        return self.rows[stage][ends[number - 1] if number else 0 : ends[number]]

    def bubble(self, number: int = 0) -> float:
        """The bubble of one call: the largest over the stages of end of last op - start of first op - compute.

        That is the definition of arXiv 2401.10241, section 5.
        """
        spans = (self.call(stage, number) for stage in range(len(self.rows)))
        return max(row[-1].end - row[0].start - busy(row) for row in spans)


def busy(spans: Sequence[Span]) -> float:
    """The time that the spans take together."""
    return sum(span.end - span.start for span in spans)


def peak_in_flight(ops: Sequence[Op]) -> int:
    """The most chunks' worth of activations held at once: from an F to its W, or to its B where there is no W."""
    kinds = Counter(op.kind for op in ops)
    frees = OpKind.WEIGHT if kinds[OpKind.WEIGHT] else OpKind.BACKWARD
    held = most = 0
    for op in ops:
        held += (op.kind is OpKind.FORWARD) - (op.kind is frees)
        most = max(most, held)
    return most

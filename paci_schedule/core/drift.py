"""Drift: how many optimizer updates a stage applies between the forward and the backward of one micro-batch.

Drift is known in closed form, and it is counted at run time; the two must agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.spec import PipelineSpec

__all__ = ["DriftMeter", "drift_bound", "drift_histogram", "drift_of"]


def drift_of(spec: PipelineSpec, stage: int, micro_batch: int) -> int:
    """Updates between F(m) and B(m) at `stage`: floor(m / a) - floor(max(0, m - d_s) / a)."""
    behind = max(0, micro_batch - spec.look_ahead(stage))
    return micro_batch // spec.accumulation - behind // spec.accumulation


def drift_bound(spec: PipelineSpec, stage: int) -> int:
    """The most that `drift_of` can be at `stage`: ceil(d_s / a)."""
    return -(-spec.look_ahead(stage) // spec.accumulation)


def drift_histogram(spec: PipelineSpec, stage: int, micro_batches: int) -> Counter[int]:
    """For each drift, how many of the first `micro_batches` micro-batches have it at `stage`: `drift_of`, summed up."""
    window, ahead = spec.accumulation, spec.look_ahead(stage)
    filling = min(micro_batches, ahead)
    histogram = Counter({number: min(window, filling - number * window) for number in range(-(-filling // window))})
    whole, rest = divmod(ahead, window)

    def early(count: int) -> int:
        """How many of the first `count` micro-batches are among the first `rest` of their window."""
        return count // window * rest + min(count % window, rest)

    one_more = early(max(micro_batches, ahead)) - early(ahead)
    histogram[whole + 1] += one_more
    histogram[whole] += micro_batches - filling - one_more
    return +histogram


class DriftMeter:
    """Counts drift from the ops as they are executed, whatever the schedule.

    Attributes:
        version: updates counted so far.
        histogram: for each drift, the number of micro-batches that had it.
    """

    def __init__(self) -> None:
        self.version = 0
        self.histogram: Counter[int] = Counter()
        self._forward_version: dict[tuple[int, int], int] = {}

    @property
    def largest(self) -> int:
        """The largest drift counted so far; 0 when no backward has been done."""
        return max(self.histogram, default=0)

    @property
    def in_flight(self) -> int:
        """Micro-batches between their forward and their backward."""
        return len(self._forward_version)

    def record(self, op: Op) -> int | None:
        """Count one op after its execution.  Returns the drift of the micro-batch for a B, None for any other op."""
        if op.kind is OpKind.FORWARD:
            self._forward_version[op.chunk, op.index] = self.version
        elif op.kind is OpKind.STEP:
            self.version += 1
        elif op.kind is OpKind.BACKWARD:
            drift = self.version - self._forward_version.pop((op.chunk, op.index))
            self.histogram[drift] += 1
            return drift
        return None

    def record_all(self, ops: Iterable[Op]) -> DriftMeter:
        """Count every op of a stream; returns the meter."""
        for op in ops:
            self.record(op)
        return self

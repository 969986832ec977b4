"""PACI's stream at the scale of clusters: all stages at once, along wavefronts, with the general simulator's results.

Give F(i) of stage s the level s + 2i, and the B that follows it in round i the level s + 2i + 1.  Everything that an op
waits for then has a lower level: the activation comes from level - 1, the gradient from level - 1 or, with extra in
flight, from further below.  So one level is one step of array arithmetic over every second stage, and a run of n
micro-batches on P stages takes about 2n + P steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paci_schedule.core.ops import OpKind
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError
from paci_schedule.simulate.costs import Costs, Noise

__all__ = ["Marks", "sweep"]

_BLOCK = 256
_MOST_STAGES, _MOST_MICRO_BATCHES = 10_000, 1_000_000


@dataclass(frozen=True)
class Marks:
    """What is kept of a run when its single ops are dropped.

    Attributes:
        start: when the first op of each stage starts, shape (stages,).
        end: when the last op of each stage ends, shape (stages,).
        busy: the time that all ops of a stage take, shape (stages,).
        starts: when the marked ops start, shape (marks, stages).
        free: when the stage could have started them, shape (marks, stages).
        busy_before: the time that the ops before the marked ones take, shape (marks, stages).
    """

    start: np.ndarray
    end: np.ndarray
    busy: np.ndarray
    starts: np.ndarray
    free: np.ndarray
    busy_before: np.ndarray

    @property
    def makespan(self) -> float:
        """From the first op of any stage to the end of the last one."""
        return float(self.end.max() - self.start.min())


def sweep(schedule: Schedule, spec: PipelineSpec, costs: Costs, micro_batches: int, every: int) -> Marks:
    """Run `micro_batches` micro-batches and the drain after them.

    Args:
        schedule: one that runs in rounds, like PACI.
        spec: the pipeline.
        costs: what things take; per-call synchronisations have no wavefronts.
        micro_batches: how many, at least 1.
        every: the forwards of micro-batches 0, `every`, 2 `every`, ... are marked.

    Raises:
        ConfigError: `costs.sync` is set, the schedule does not exist for `spec`, or the run is too large.
    """
    schedule.check(spec)
    if spec.stages > _MOST_STAGES or micro_batches + spec.look_ahead(0) > _MOST_MICRO_BATCHES:
        raise ConfigError(
            f"{spec.stages} stages, {micro_batches} micro-batches and {spec.look_ahead(0)} ahead: a run has at most "
            f"{_MOST_STAGES} stages and {_MOST_MICRO_BATCHES} micro-batches; take fewer"
        )
    if costs.sync is not None:
        raise ConfigError(f"sync={costs.sync}: a run that synchronises every call has no wavefronts; use simulate()")
    return _Sweep(schedule, spec, costs, micro_batches).run(every)


class _Sweep:
    """The state of one run; its arrays have one element a stage."""

    def __init__(self, schedule: Schedule, spec: PipelineSpec, costs: Costs, count: int) -> None:
        stages, base = spec.stages, costs.durations(schedule, spec.stages)
        self.count, self.update_every = count, schedule.micro_batches_per_update(spec)
        self.latency, self.transfer = costs.latencies(stages), costs.transfers(stages)
        self.latency_up, self.transfer_up = np.roll(self.latency, 1), np.roll(self.transfer, 1)
        self.transfers = bool(self.transfer.any())
        self.stage = np.arange(stages)
        self.ahead = np.array([spec.look_ahead(stage) for stage in range(stages)])
        reach = stages + int(self.ahead[0])
        self.forward, self.backward = (
            _Durations(base[kind], costs.noise(kind, 0, stages), reach) for kind in (OpKind.FORWARD, OpKind.BACKWARD)
        )
        self.step = base[OpKind.STEP]
        self.steps = bool(self.step.any())
        self.free, self.busy = np.zeros(stages), np.zeros(stages)
        self.down_free, self.up_free = np.zeros(stages), np.zeros(stages)
        # What stage s waits for stands at s of `activation` and at s + 1 of `gradient`.  Where a stage takes gradients
        # more than one round after they came (extra in flight), there are `depth` rows of them, by micro-batch modulo
        # `depth`.
        self.depth = int(max(1, -np.diff(self.ahead).min(initial=-1)))
        self.activation = np.zeros(stages + 1)
        self.gradient = np.zeros((self.depth, stages + 1) if self.depth > 1 else stages + 1)

    def run(self, every: int) -> Marks:
        """Run all levels; at every `every`-th F the marks are noted."""
        stages, rounds = len(self.stage), 2 * (self.count - 1)
        starts, free, busy_before = np.zeros((3, -(-self.count // every), stages))
        first = self.stage + 2 * self.ahead + 1  # the level of each stage's B(0); it falls with the stage
        low, high = stages, stages - 1  # the stages that have a B at this level, both included
        for level in range(int(first[0]) + rounds + 1):
            bottom, top = max(0, level - rounds), min(stages - 1, level)
            bottom += (level - bottom) % 2
            if bottom <= top:
                mark = np.arange(-(-(level - top) // (2 * every)), (level - bottom) // (2 * every) + 1)
                stage = level - 2 * every * mark
                free[mark, stage], busy_before[mark, stage] = self.free[stage], self.busy[stage]
                began = self._forwards(level, slice(bottom, top + 1, 2))
                starts[mark, stage] = began[(stage - bottom) // 2]
            while low and first[low - 1] <= level:
                low -= 1
            while high >= 0 and first[high] + rounds < level:
                high -= 1
            bottom = low + (level - 1 - low) % 2
            if bottom <= high:
                self._backwards(level, slice(bottom, high + 1, 2))
        return Marks(starts[0], self.free, self.busy, starts, free, busy_before)

    def _forwards(self, level: int, row: slice) -> np.ndarray:
        """The forwards of one level; returns when they start."""
        starts = np.maximum(self.free[row], self.activation[row])
        takes = self.forward.of(row, lambda: (level - self.stage[row]) // 2)
        ends = self.free[row] = starts + takes
        self.busy[row] += takes
        if self.transfers:
            ends = self.down_free[row] = np.maximum(ends, self.down_free[row]) + self.transfer[row]
        self.activation[row.start + 1 : row.stop + 1 : 2] = ends + self.latency[row]
        return starts

    def _backwards(self, level: int, row: slice) -> None:
        """The backwards of one level, and the updates after them."""
        micro_batch = (level - 1 - self.stage[row]) // 2 - self.ahead[row]
        comes, goes = slice(row.start + 1, row.stop + 1, 2), row
        if self.depth > 1:
            slot = micro_batch % self.depth
            comes, goes = (slot, self.stage[row] + 1), (slot, self.stage[row])
        takes = self.backward.of(row, lambda: micro_batch)
        ends = self.free[row] = np.maximum(self.free[row], self.gradient[comes]) + takes
        self.busy[row] += takes
        if self.steps:
            update = self.step[row] * ((micro_batch + 1) % self.update_every == 0)
            self.free[row] += update
            self.busy[row] += update
        if self.transfers:
            ends = self.up_free[row] = np.maximum(ends, self.up_free[row]) + self.transfer_up[row]
        self.gradient[goes] = ends + self.latency_up[row]


class _Durations:
    """How long the ops of one kind take; their jitter is kept for the last `reach` micro-batches and a block more."""

    def __init__(self, base: np.ndarray, noise: Noise | None, reach: int) -> None:
        self.base, self.noise, self.drawn = base, noise, 0
        self.stage = np.arange(len(base))
        self.blocks = -(-reach // _BLOCK) + 1
        self.kept = np.empty((self.blocks * _BLOCK if noise else 0, len(base)))

    def of(self, row: slice, micro_batches: Callable[[], np.ndarray]) -> np.ndarray:
        """The durations of one op of each stage in `row`, whose micro-batches the function returns."""
        if self.noise is None:
            return self.base[row]
        wanted = micro_batches()
        while self.drawn <= max(wanted[0], wanted[-1]):
            at = self.drawn % len(self.kept)
            self.kept[at : at + _BLOCK] = self.noise.rows(_BLOCK)
            self.drawn += _BLOCK
        return self.base[row] * self.kept[wanted % len(self.kept), self.stage[row]]

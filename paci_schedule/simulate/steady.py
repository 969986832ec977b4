"""The steady state of a schedule: how long a micro-batch takes when filling and draining are forgotten.

Without jitter a pipe comes to repeat itself: after some number of micro-batches every stage does the same again, the
same time later.  With links that take time that number is rarely one batch (PACI on 4 stages repeats every 4
micro-batches), so the cycle is looked for and whole cycles are counted.  With jitter nothing repeats, and a long run is
averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paci_schedule.core.ops import OpKind
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.execute import check_size, simulate
from paci_schedule.simulate.timeline import Timeline
from paci_schedule.simulate.wavefront import Marks, sweep

__all__ = ["Steady", "run", "steady_state", "warm_up"]

_AGREE = 1e-12  # as a share of the time that has passed: times that are closer together count as equal
_MOST_ROUNDS = 20_000  # of one run along wavefronts
_MOST_OPS = 300_000  # of one run of the general simulator
_MOST_MARKS = 8_000_000  # of all stages together


@dataclass(frozen=True)
class Steady:
    """The steady state of a run; arrays have the shape (stages,).

    Attributes:
        period: the time that a micro-batch takes.
        busy: the part of that time in which the stage computes.
        micro_batches: the length of the run in which this was seen.
        makespan: the makespan of that run.
    """

    period: np.ndarray
    busy: np.ndarray
    micro_batches: int
    makespan: float


def warm_up(schedule: Schedule, spec: PipelineSpec) -> int:
    """Batches after which the pipe has certainly been full for a while, and a stage has heard from the others."""
    return 1 if schedule.flushes else -(-2 * spec.in_flight(0) // spec.accumulation)


def run(schedule: Schedule, spec: PipelineSpec, costs: Costs, micro_batches: int, every: int) -> Marks:
    """Run whole batches from an empty pipe to an empty pipe, by the fastest simulator that can.

    Raises:
        ConfigError: the schedule does not exist for `spec`, or the run is too large.
    """
    if _has_wavefronts(schedule, costs):
        return sweep(schedule, spec, costs, micro_batches, every)
    batches = micro_batches // spec.accumulation
    return _marks(simulate(schedule, spec, costs, batches), range(0, batches, every // spec.accumulation))


def steady_state(schedule: Schedule, spec: PipelineSpec, costs: Costs, batches: int = 0) -> Steady:
    """Run until the pipe repeats itself; with jitter as long as is affordable, or `batches` batches if that is longer.

    Raises:
        ConfigError: the schedule does not exist for `spec`, or even the shortest run is too large.
    """
    schedule.check(spec)
    warm, batch = warm_up(schedule, spec), spec.accumulation
    affordable = _affordable(schedule, spec, costs)
    if costs.jitter:
        count = max(batches, warm + 2, affordable // batch) * batch
        return _between(run(schedule, spec, costs, count, warm * batch), 1, warm * batch, count)
    # What repeats itself does so in whole updates, and where these take no time, in micro-batches.
    if _has_wavefronts(schedule, costs):
        steps = costs.durations(schedule, spec.stages)[OpKind.STEP].any()
        unit, every = schedule.micro_batches_per_update(spec) if steps else 1, 1
        count = 2 * (spec.in_flight(0) + unit)
    else:
        check_size(schedule, spec, warm + 2, " (as many as a steady state takes)")
        unit = every = batch
        count = (warm + 2) * batch
    while True:
        if count * spec.stages > _MOST_MARKS * every:
            every = -(-count * spec.stages // (_MOST_MARKS * unit)) * unit
        marks = run(schedule, spec, costs, count, every)
        lasting = 2 if schedule.flushes else -(-spec.in_flight(0) // every) + 1
        cycles = _cycles(np.hstack([marks.starts, marks.free]), lasting, max(1, unit // every))
        last = len(marks.starts) - 1
        if cycles or count + unit > affordable:
            half = max(1, last // 2 * every // unit) * unit // every
            return _between(marks, last - (cycles or half), every, count)
        count = min(2 * count, affordable // unit * unit)


def _affordable(schedule: Schedule, spec: PipelineSpec, costs: Costs) -> int:
    """Micro-batches that a run may have before it takes too long for a figure."""
    if _has_wavefronts(schedule, costs):
        return _MOST_ROUNDS
    return _MOST_OPS // (3 * spec.stages * schedule.chunks)


def _has_wavefronts(schedule: Schedule, costs: Costs) -> bool:
    return schedule.in_rounds and costs.sync is None


def _cycles(times: np.ndarray, lasting: int, unit: int) -> int | None:
    """The last marks that are whole cycles of the shortest one: after a cycle, a multiple of `unit`, everything happens
    again the same time later.  None where that has not been so for `lasting` marks and a whole cycle.

    Args:
        times: shape (marks, any).
        lasting: how many marks describe all that is under way.
        unit: marks.
    """
    same = _AGREE * times[-1].max()
    alike = np.flatnonzero(np.ptp(times[-1] - times[:-1], axis=1) <= same)
    for cycle in (len(times) - 1 - alike[::-1]).tolist():
        seen = max(cycle, lasting)
        if seen + cycle > len(times):
            return None
        if cycle % unit == 0 and np.ptp(times[-seen:] - times[-seen - cycle : len(times) - cycle]) <= same:
            shifts = times[cycle:] - times[:-cycle]
            odd = np.flatnonzero(np.abs(shifts - shifts[-1, 0]).max(axis=1) > same)
            return (len(shifts) - (odd[-1] + 1 if odd.size else 0)) // cycle * cycle
    return None


def _between(marks: Marks, first: int, every: int, count: int) -> Steady:
    """The steady state between a mark and the last one, per micro-batch."""
    passed = (len(marks.starts) - 1 - first) * every
    return Steady(
        (marks.starts[-1] - marks.starts[first]) / passed,
        (marks.busy_before[-1] - marks.busy_before[first]) / passed,
        count,
        marks.makespan,
    )


def _marks(timeline: Timeline, calls: range) -> Marks:
    """The marks of a run of the general simulator: the first op of each of `calls`."""
    firsts = [[(0, *ends)[number] for number in calls] for ends in timeline.calls]
    ends = [np.array([0.0, *(span.end for span in row)]) for row in timeline.rows]
    spent = [np.cumsum([0.0, *(span.end - span.start for span in row)]) for row in timeline.rows]
    return Marks(
        start=np.array([row[0].start for row in timeline.rows]),
        end=np.array([row[-1] for row in ends]),
        busy=np.array([row[-1] for row in spent]),
        starts=np.array([[row[at].start for at in first] for row, first in zip(timeline.rows, firsts, strict=True)]).T,
        free=np.array([row[first] for row, first in zip(ends, firsts, strict=True)]).T,
        busy_before=np.array([row[first] for row, first in zip(spent, firsts, strict=True)]).T,
    )

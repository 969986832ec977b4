"""The figures of a schedule: how long it takes, how much of that it waits, and what it holds meanwhile."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from paci_schedule.costs import Costs
from paci_schedule.drift import DriftMeter, drift_histogram
from paci_schedule.errors import ConfigError
from paci_schedule.schedules.base import Schedule
from paci_schedule.schedules.paci import Paci
from paci_schedule.simulate import simulate
from paci_schedule.spec import PipelineSpec
from paci_schedule.timeline import Timeline, busy, peak_in_flight
from paci_schedule.wavefront import Marks, sweep

__all__ = ["Report", "report", "time_per_micro_batch"]

_AGREE = 1e-9  # the steady state is reached when a run and one of twice its length agree this well
_MOST_OPS = 300_000  # of one run of the general simulator
_MOST_ROUNDS = 20_000  # of one run along wavefronts


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `report` finds.  Times are in the unit of the costs; lists have one value a stage."""

    makespan: float
    """From the first op to the last, of the batches asked for, filling and draining included."""

    time_per_micro_batch: float
    """In the steady state: the time between two batches by the micro-batches of one."""

    bubble: float
    """Of one batch, the largest over the stages of end of last op - start of first op - compute; of a schedule that
    does not flush, what a stage waits per batch in the steady state."""

    bubble_share: float
    """`bubble` by the time that the batch takes its stage."""

    waiting_share: list[float]
    """Of the time of every stage in the steady state, the share in which it computes nothing."""

    peak_in_flight: list[float]
    """Micro-batches whose activations are held at once; with v chunks a stage a chunk's counts 1/v."""

    max_drift: list[int]
    """Updates between the forward and the backward of a micro-batch, at the most."""

    drift_histogram: list[dict[int, int]]
    """Drift -> micro-batches."""

    weight_versions: list[int]
    """Versions of its weights that a stage keeps."""

    activation_bytes: list[float]
    """Activations at their peak."""

    weight_bytes: list[float]
    """Weights, without stashes."""

    stash_bytes: list[float]
    """Further versions of the weights."""


def report(
    schedule: Schedule,
    spec: PipelineSpec,
    costs: Costs,
    batches: int | None = None,
    *,
    activation_bytes: float = 0.0,
    weight_bytes: float = 0.0,
) -> Report:
    """Simulate and sum up.

    Args:
        schedule: which schedule.
        spec: the pipeline.
        costs: what things take.
        batches: how many batches `makespan`, `peak_in_flight` and the drift are of; None: one for the makespan, and
        enough
            to reach the steady state for the others.
        activation_bytes: activations of one micro-batch on one stage.
        weight_bytes: weights of one stage.

    Raises:
        ConfigError: the schedule does not exist for `spec`, or a value has no sense.
    """
    schedule.check(spec)
    if batches is not None and batches < 1:
        raise ConfigError(f"batches={batches}: must be at least 1")
    steady = _steady(schedule, spec, costs, batches or 0)
    counted = batches or steady.batches
    makespan = steady.makespan if steady.batches == batches else _makespan(schedule, spec, costs, batches or 1)
    drift = [_drift(schedule, spec, stage, counted) for stage in range(spec.stages)]
    peak = [_peak(schedule, spec, stage, counted) for stage in range(spec.stages)]
    versions = [schedule.weight_versions(spec, stage) for stage in range(spec.stages)]
    bubbles, spent = steady.period - steady.busy, steady.period
    if schedule.flushes:
        batch = simulate(schedule, spec, costs)
        spent = np.array([row[-1].end - row[0].start for row in batch.rows])
        bubbles = spent - [busy(row) for row in batch.rows]
    return Report(
        makespan=makespan,
        time_per_micro_batch=float(steady.period.max()) / spec.accumulation,
        bubble=_rounded(bubbles.max(), spent.max()),
        bubble_share=_rounded((bubbles / np.maximum(spent, np.finfo(float).tiny)).max(), 1.0),
        waiting_share=[
            _rounded(share, 1.0) for share in 1 - steady.busy / np.maximum(steady.period, np.finfo(float).tiny)
        ],
        peak_in_flight=peak,
        max_drift=[max(histogram, default=0) for histogram in drift],
        drift_histogram=[dict(sorted(histogram.items())) for histogram in drift],
        weight_versions=versions,
        activation_bytes=[held * activation_bytes for held in peak],
        weight_bytes=[weight_bytes] * spec.stages,
        stash_bytes=[(kept - 1) * weight_bytes for kept in versions],
    )


def time_per_micro_batch(schedule: Schedule, spec: PipelineSpec, costs: Costs) -> float:
    """`Report.time_per_micro_batch` from one short run: for comparing many pipelines."""
    warm = _warm_up(schedule, spec)
    return float(_window(schedule, spec, costs, warm, warm + 3).period.max()) / spec.accumulation


@dataclass(frozen=True)
class _Steady:
    """Per batch and stage in the steady state, shape (stages,); and the run that it was seen in."""

    period: np.ndarray
    busy: np.ndarray
    batches: int
    makespan: float


def _warm_up(schedule: Schedule, spec: PipelineSpec) -> int:
    """Batches after which the pipe has certainly been full for a while, and a stage has heard from the others."""
    return 1 if schedule.flushes else -(-2 * spec.in_flight(0) // spec.accumulation)


def _steady(schedule: Schedule, spec: PipelineSpec, costs: Costs, batches: int) -> _Steady:
    """Run until the time between two batches settles; with jitter, as long as is affordable, or `batches` if they are
    more."""
    warm = _warm_up(schedule, spec)
    if _has_wavefronts(schedule, costs):
        affordable = _MOST_ROUNDS // spec.accumulation
    else:
        affordable = _MOST_OPS // (3 * spec.stages * schedule.chunks * spec.accumulation)
    least, most = warm + 2, max(warm + 2, affordable)
    if costs.jitter or batches > least:
        return _window(schedule, spec, costs, warm, max(batches, least if batches > least else most))
    count = least
    found = _window(schedule, spec, costs, warm, count)
    while count < most:
        count = min(2 * count, most)
        longer = _window(schedule, spec, costs, count // 2, count)
        settled = np.allclose(found.period, longer.period, rtol=_AGREE, atol=0)
        found = longer
        if settled:
            break
    return found


def _window(schedule: Schedule, spec: PipelineSpec, costs: Costs, warm: int, batches: int) -> _Steady:
    """What is between the start of batch `warm` and that of the last of `batches` batches."""
    window = warm, batches - 1
    if _has_wavefronts(schedule, costs):
        marks = sweep(schedule, spec, costs, batches, window)
    else:
        marks = _marks(simulate(schedule, spec, costs, batches), window)
    between = window[1] - window[0]
    return _Steady(
        (marks.window[1] - marks.window[0]) / between,
        marks.window_busy / between,
        batches,
        float(marks.end.max() - marks.start.min()),
    )


def _has_wavefronts(schedule: Schedule, costs: Costs) -> bool:
    return isinstance(schedule, Paci) and costs.sync is None


def _marks(timeline: Timeline, window: tuple[int, int]) -> Marks:
    """The marks of a run of the general simulator."""
    stages = range(len(timeline.rows))
    first, last = ([timeline.calls[stage][at - 1] for stage in stages] for at in window)
    return Marks(
        start=np.array([row[0].start for row in timeline.rows]),
        end=np.array([row[-1].end for row in timeline.rows]),
        busy=np.array([busy(row) for row in timeline.rows]),
        window=np.array([[timeline.rows[stage][at[stage]].start for stage in stages] for at in (first, last)]),
        window_busy=np.array([busy(timeline.rows[stage][first[stage] : last[stage]]) for stage in stages]),
    )


def _makespan(schedule: Schedule, spec: PipelineSpec, costs: Costs, batches: int) -> float:
    if _has_wavefronts(schedule, costs):
        marks = sweep(schedule, spec, costs, batches, (0, 0))
        return float(marks.end.max() - marks.start.min())
    return simulate(schedule, spec, costs, batches).makespan


def _drift(schedule: Schedule, spec: PipelineSpec, stage: int, batches: int) -> Counter[int]:
    if isinstance(schedule, Paci):  # counting would take long at scale; the closed form is tested against it
        stream = replace(spec, accumulation=schedule.micro_batches_per_update(spec))
        return drift_histogram(stream, stage, batches * spec.accumulation)
    return DriftMeter().record_all(schedule.stream(spec, stage, 1)).histogram


def _peak(schedule: Schedule, spec: PipelineSpec, stage: int, batches: int) -> float:
    if isinstance(schedule, Paci):
        return min(spec.in_flight(stage), batches * spec.accumulation)
    peak = peak_in_flight(list(schedule.stream(spec, stage, 1))) / schedule.chunks
    return int(peak) if peak == int(peak) else peak


def _rounded(value: float, scale: float) -> float:
    """`value`, or 0 where it is no more than the rounding of numbers as large as `scale`."""
    return float(value) if abs(value) > 1e-9 * scale else 0.0

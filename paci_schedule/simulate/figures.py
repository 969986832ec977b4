"""The figures of a schedule: how long it takes, how much of that time it waits, and how much memory it holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from paci_schedule.core.drift import DriftMeter, drift_histogram
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError
from paci_schedule.simulate.costs import Costs, check_amount
from paci_schedule.simulate.steady import run, steady_state, warm_up
from paci_schedule.simulate.timeline import peak_in_flight

__all__ = ["Report", "figures_of", "time_per_micro_batch"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `report` finds.  Times are in the unit of the costs; lists have one value a stage."""

    makespan: float
    """From the first op to the last, of the batches asked for, filling and draining included."""

    time_per_micro_batch: float
    """In the steady state: the time between two batches, divided by the micro-batches of a batch."""

    bubble: float
    """The largest, over the stages, of the time that a stage waits during one batch: end of its last op - start of its
    first op - compute.  For a schedule that does not flush, the wait per batch in the steady state."""

    bubble_share: float
    """The bubble divided by the time that the batch takes its stage."""

    waiting_share: list[float]
    """For each stage, the share of the time in the steady state in which it computes nothing."""

    peak_in_flight: list[float]
    """Micro-batches whose activations are held at once; with v chunks a stage a chunk's counts 1/v."""

    max_drift: list[int]
    """The most updates between the forward and the backward of a micro-batch."""

    counted_batches: int
    """The batches, from an empty pipe on, over which `peak_in_flight`, `max_drift` and `drift_histogram` count."""

    drift_histogram: list[dict[int, int]]
    """For each drift, the number of micro-batches that have it."""

    weight_versions: list[int]
    """Versions of its weights that a stage keeps."""

    activation_bytes: list[float]
    """Bytes of activations at their peak."""

    weight_bytes: list[float]
    """Bytes of weights, without stashed versions."""

    stash_bytes: list[float]
    """Bytes of further versions of the weights."""


def figures_of(
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
        batches: the number of batches over which makespan, peaks and drift are taken; None for one batch for the
            makespan, and for the others as many as it takes to reach the steady state.
        activation_bytes: activations of one micro-batch on one stage.
        weight_bytes: weights of one stage.

    Raises:
        ConfigError: the schedule does not exist for `spec`, or a value is outside its range.
    """
    schedule.check(spec)
    if batches is not None and batches < 1:
        raise ConfigError(f"batches={batches}: must be at least 1")
    check_amount("activation_bytes", activation_bytes)
    check_amount("weight_bytes", weight_bytes)
    batch = spec.accumulation
    count = (batches or 1) * batch
    steady = steady_state(schedule, spec, costs, batches or 0)
    whole = None if steady.micro_batches == count else run(schedule, spec, costs, count, count)
    counted = batches or warm_up(schedule, spec) + 2  # by then every drift has been seen
    drift = [_drift(schedule, spec, stage, counted) for stage in range(spec.stages)]
    peak = [_peak(schedule, spec, stage, counted) for stage in range(spec.stages)]
    versions = [schedule.weight_versions(spec, stage) for stage in range(spec.stages)]
    bubbles, spent = (steady.period - steady.busy) * batch, steady.period * batch
    if schedule.flushes:
        one = whole if whole and count == batch else run(schedule, spec, costs, batch, batch)
        spent = one.end - one.start
        bubbles = spent - one.busy
    return Report(
        makespan=whole.makespan if whole else steady.makespan,
        time_per_micro_batch=float(steady.period.max()),
        bubble=_rounded(bubbles.max(), spent.max()),
        bubble_share=_rounded((bubbles / np.maximum(spent, np.finfo(float).tiny)).max(), 1.0),
        waiting_share=[
            _rounded(share, 1.0) for share in 1 - steady.busy / np.maximum(steady.period, np.finfo(float).tiny)
        ],
        peak_in_flight=peak,
        max_drift=[max(histogram, default=0) for histogram in drift],
        counted_batches=counted,
        drift_histogram=[dict(sorted(histogram.items())) for histogram in drift],
        weight_versions=versions,
        activation_bytes=[held * activation_bytes for held in peak],
        weight_bytes=[weight_bytes] * spec.stages,
        stash_bytes=[(kept - 1) * weight_bytes for kept in versions],
    )


def time_per_micro_batch(schedule: Schedule, spec: PipelineSpec, costs: Costs) -> float:
    """Only `Report.time_per_micro_batch`."""
    return float(steady_state(schedule, spec, costs).period.max())


def _drift(schedule: Schedule, spec: PipelineSpec, stage: int, batches: int) -> Counter[int]:
    if schedule.in_rounds:  # counting would take long at scale; the closed form is tested against it
        stream = replace(spec, accumulation=schedule.micro_batches_per_update(spec))
        return drift_histogram(stream, stage, batches * spec.accumulation)
    return DriftMeter().record_all(schedule.stream(spec, stage, 1)).histogram


def _peak(schedule: Schedule, spec: PipelineSpec, stage: int, batches: int) -> float:
    if schedule.in_rounds:
        return min(spec.in_flight(stage), batches * spec.accumulation)
    peak = peak_in_flight(list(schedule.stream(spec, stage, 1))) / schedule.chunks
    return int(peak) if peak == int(peak) else peak


def _rounded(value: float, scale: float) -> float:
    """`value`, or 0 where it is no more than the rounding of numbers as large as `scale`."""
    return float(value) if abs(value) > 1e-9 * scale else 0.0

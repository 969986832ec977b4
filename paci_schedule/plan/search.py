"""The search for the fastest pipeline of a job: every division of the devices, every schedule, with memory and drift.

The layers are divided by `partition.balance`: the slowest stage is as fast as the memory of the stages allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf, isqrt
from typing import Any, NamedTuple

from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.core.staleness import predictions_of_an_update
from paci_schedule.errors import ConfigError
from paci_schedule.plan.job import DATA_PARALLEL, Job, Row
from paci_schedule.plan.layers import Layer
from paci_schedule.plan.partition import NothingFitsError, Partition, StageMemory, balance, parameters_of_stages
from paci_schedule.plan.prices import costs_of, drifted_share, memory_of
from paci_schedule.plan.ranking import ALIKE, SLOWER, compared, ranked
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.figures import time_per_micro_batch
from paci_schedule.simulate.slack import least_slack

__all__ = ["calibrated", "search"]

_GIB = 2**30


def search(job: Job) -> list[Row]:
    """All rows: first those that can run, as `plan.ranking` puts them, then the refused ones with their reasons.

    On one stage every schedule is plain gradient accumulation; such rows appear once, as data parallel.  Where links
    take time, a row that can hide them with slack appears with and without it.  A row is not simulated if even without
    waiting for anything it would be more than 1% slower than another one of its schedule and division of the devices;
    it is refused with that reason.
    """
    table = _Table(job)
    places: dict[tuple[str, int, int], list[_Shape]] = {}
    for shape in _shapes(job):
        for name in job.schedules:
            if shape.stages > 1 or name == "1f1b":
                places.setdefault((name, shape.stages, shape.slices), []).append(shape)
    rows = [row for (name, *_), shapes in places.items() for row in table.place(name, shapes)]
    return ranked(compared(rows))


def calibrated(job: Job, samples_per_second_per_device: float) -> Job:
    """The same job on devices that are as fast as a measured run with 1f1b showed them to be.

    The job's `stages` and `micro_batch_sizes` must name that run.

    Raises:
        ConfigError: the job does not name one run, 1f1b cannot run there, or the links by themselves take longer than
            the measured run.
    """
    if not samples_per_second_per_device > 0:
        raise ConfigError(f"measured={samples_per_second_per_device}: must be more than 0")
    shapes = [shape for shape in _shapes(job) if not shape.recompute]
    if len(shapes) != 1:
        raise ConfigError(
            f"measured: {len(shapes)} pipelines match; name the measured one's stages and micro-batch size"
        )
    for _ in range(60):
        device = job.device
        unlimited = replace(job, device=replace(device, memory=inf))
        row = _Table(unlimited).row("1f1b", shapes[0])
        if row.refused:
            raise ConfigError(f"measured: 1f1b cannot run there ({row.refused}); name the measured run's stages")
        ratio = samples_per_second_per_device / row.samples_per_second_per_device
        if abs(ratio - 1) < 1e-9:
            return job
        faster = replace(device, flops=device.flops * ratio, memory_bandwidth=device.memory_bandwidth * ratio)
        job = replace(job, device=faster)
    raise ConfigError(
        f"measured={samples_per_second_per_device}: cannot be reached with this bandwidth and latency; correct these"
    )


class _Shape(NamedTuple):
    """A division of the devices and of the batch."""

    stages: int
    slices: int
    size: int
    accumulation: int
    recompute: bool


def _shapes(job: Job) -> Iterator[_Shape]:
    """Every pipeline to search."""
    for slices in job.slices:
        for stages in job.stages or _divisors(job.devices // slices):
            replicas, unused = divmod(job.devices, stages * slices)
            share, rest = divmod(job.global_batch, max(1, replicas))
            if rest or unused or not replicas:
                continue  # the replicas cannot share the batch, or the devices, evenly
            sizes = job.micro_batch_sizes or [1 << power for power in range(share.bit_length())]
            for size in sizes:
                if share % size == 0:
                    for recompute in job.recompute:
                        yield _Shape(stages, slices, size, share // size, recompute)


def _divisors(number: int) -> list[int]:
    """All divisors, the smallest first."""
    small = [count for count in range(1, isqrt(number) + 1) if number % count == 0]
    return small + [number // count for count in reversed(small) if count * count != number]


class _Draft(NamedTuple):
    """A row that is not simulated yet, and what it takes to do so.

    Attributes:
        at_most: tokens per second of the whole job if nobody waited longer than the schedule itself requires; 0 where
            the row is refused.
    """

    row: Row
    chosen: Schedule
    spec: PipelineSpec
    shape: _Shape
    costs: Costs | None = None
    at_most: float = 0.0


class _Table:
    """The rows of a job; a partition that several of them share is searched once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._layers: dict[tuple[int, int], list[Layer]] = {}
        self._known: dict[tuple[Any, ...], Partition | NothingFitsError] = {}

    def place(self, name: str, shapes: Sequence[_Shape]) -> list[Row]:
        """The rows of a schedule on one division of the devices."""
        drafts = sorted((self._draft(name, shape) for shape in shapes), key=lambda draft: -draft.at_most)
        rows: list[Row] = []
        best = 0.0
        for draft in drafts:
            if not draft.row.refused and draft.at_most < ALIKE * best:
                slower = f"{SLOWER}, at most {draft.at_most:,.0f} tokens/s without any wait"
                rows.append(replace(draft.row, refused=slower))
                continue
            rows += self._timed(draft)
            best = max(best, *(row.tokens_per_second for row in rows))
        return rows

    def row(self, name: str, shape: _Shape) -> Row:
        """One row, simulated unless it is refused."""
        return self._timed(self._draft(name, shape))[0]

    def _timed(self, draft: _Draft) -> list[Row]:
        """The row of a draft, simulated; and another one with slack where that can hide its links."""
        if draft.costs is None:
            return [draft.row]
        row, spec = draft.row, draft.spec
        try:
            seconds = time_per_micro_batch(draft.chosen, spec, draft.costs)
        except ConfigError as error:  # too many ops to simulate
            return [replace(row, refused=str(error))]
        samples = row.replicas * row.micro_batch_size / seconds
        row = replace(
            row,
            tokens_per_second=samples * self._job.model.sequence_length,
            samples_per_second_per_device=samples / self._job.devices,
            seconds_per_micro_batch=seconds,
        )
        if spec.extra_in_flight or "extra_in_flight" not in draft.chosen.options:
            return [row]
        slack = least_slack(draft.chosen, spec, draft.costs)
        return [row, *(self._timed(self._draft(draft.row.schedule, draft.shape, slack)) if any(slack) else [])]

    def _draft(self, name: str, shape: _Shape, slack: tuple[int, ...] = ()) -> _Draft:
        """A row before it is simulated."""
        job, chosen = self._job, schedule(name)
        spec = PipelineSpec(stages=shape.stages, accumulation=shape.accumulation, extra_in_flight=slack or 0)
        row = Row(
            schedule=name if shape.stages > 1 else DATA_PARALLEL,
            stages=shape.stages,
            slices=shape.slices,
            replicas=job.devices // shape.stages // shape.slices,
            micro_batch_size=shape.size,
            accumulation=shape.accumulation,
            recompute=shape.recompute,
            extra_in_flight=slack,
            drift=chosen.drift_bound(spec, 0),
            predictions=predictions_of_an_update(spec, 0, job.prediction) if "prediction" in chosen.options else 0,
        )
        reason = _impossible(job, chosen, spec, row)
        if reason:
            return _Draft(replace(row, refused=reason), chosen, spec, shape)
        layers = self._layers_of(shape)
        memories = [memory_of(job, chosen, spec, row, stage) for stage in range(shape.stages)]
        partition = self._partition(shape, layers, memories)
        if isinstance(partition, NothingFitsError):
            memory = max(partition.nearest.peak_bytes)
            refused = f"needs {memory / _GIB:.1f} GiB of {job.device.usable / _GIB:.1f}"
            return _Draft(replace(row, memory=memory, refused=refused), chosen, spec, shape)
        row = replace(
            row,
            memory=max(partition.peak_bytes),
            drifted=drifted_share(chosen, spec),
            headroom=sum(memory.limit for memory in memories) - sum(partition.peak_bytes),
            layers=[stop - start for start, stop in pairwise(partition.bounds)],
            stage_parameters=parameters_of_stages(layers, partition.bounds),
            stage_seconds=list(partition.seconds),
        )
        costs = costs_of(job, spec, row, layers, partition)
        filling = sum(partition.seconds) - partition.slowest if name in ("gpipe", "1f1b") else 0.0
        least = partition.slowest + filling / shape.accumulation
        at_most = row.replicas * shape.size * job.model.sequence_length / least
        return _Draft(row, chosen, spec, shape, costs, at_most)

    def _layers_of(self, shape: _Shape) -> list[Layer]:
        key = shape.size, shape.slices
        if key not in self._layers:
            self._layers[key] = self._job.model.layers_on(self._job.device, *key)
        return self._layers[key]

    def _partition(
        self, shape: _Shape, layers: Sequence[Layer], memories: Sequence[StageMemory]
    ) -> Partition | NothingFitsError:
        """The fastest partition of the row's layers, or why there is none."""
        key = shape.size, shape.slices, shape.recompute, *memories
        if key not in self._known:
            try:
                self._known[key] = balance(layers, memories, recompute_every=int(shape.recompute))
            except NothingFitsError as error:
                self._known[key] = error
        return self._known[key]


def _impossible(job: Job, chosen: Schedule, spec: PipelineSpec, row: Row) -> str:
    """Why the row cannot run, whatever its memory; "" where it can."""
    if spec.stages * chosen.chunks > job.model.count:
        return f"{spec.stages} stages with {chosen.chunks} chunks, and {job.model.count} layers"
    if row.recompute and chosen.splits_backward:
        return "recomputing in B would keep the activations that W needs after all"
    if row.drift > job.max_drift:
        return f"drift up to {row.drift}, limit {job.max_drift}"
    try:
        chosen.check(spec)
    except ConfigError as error:
        return str(error)
    return job.model.check_tensor(row.slices) if row.slices > 1 else ""

"""The search for the fastest pipeline of a job: every division of the devices, every schedule, with memory and drift.

The layers are divided by `partition.balance`: the slowest stage is as fast as the memory of the stages allows.
Data-parallel replicas average their gradients in a ring when a stage steps.  A stage's memory holds weights (bf16),
gradients and optimizer states (fp32; AdamW's two moments and the master copy, divided over the replicas under ZeRO-1),
the weights that its schedule stashes, and the activations in flight.  Predicted weights are written over the bf16
weights; replicas gather them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from math import inf, isqrt
from typing import Any

from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.schedules.registry import SCHEDULES, schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.core.staleness import interval_of, predictions_of_an_update
from paci_schedule.errors import ConfigError
from paci_schedule.plan.partition import NothingFitsError, Partition, StageMemory, balance
from paci_schedule.plan.transformer import Model
from paci_schedule.simulate.costs import Costs, check_amount
from paci_schedule.simulate.figures import time_per_micro_batch

__all__ = ["Job", "Row", "calibrated", "search"]

_GIB = 2**30
_WEIGHT, _GRADIENT, _OPTIMIZER = 2, 4, 12  # bytes a parameter


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, on which devices, and what the search may choose.

    Raises:
        ConfigError: a value is out of its range.
    """

    model: Model
    """The layers to divide."""

    devices: int
    """The number of devices, which are all alike."""

    memory: float
    """The memory of one device, in bytes."""

    global_batch: int
    """The number of sequences in an optimizer update."""

    flops: float = 1.0
    """Floating-point operations that a device does in a second.  For measured layers: how many times as fast a device
    is as the one that they were measured on."""

    bandwidth: float = float("inf")
    """Bytes per second between two devices."""

    latency: float = 0.0
    """Seconds that a message is on its way, whatever its size."""

    zero: int = 1
    """ZeRO stage of the optimizer state: 0 or 1."""

    max_drift: int = 1
    """The most updates between a forward and its backward."""

    schedules: Sequence[str] = tuple(SCHEDULES)
    """The schedules to search."""

    stages: Sequence[int] = ()
    """The numbers of stages to search; empty means every divisor of `devices`."""

    micro_batch_sizes: Sequence[int] = ()
    """The micro-batch sizes to search, in sequences; empty means every power of 2 that divides a replica's share."""

    recompute: Sequence[bool] = (False, True)
    """Whether layers are recomputed in the backward."""

    prediction: str | int = "off"
    """When PACI predicts the weights of stale forwards (`core.staleness.interval_of`)."""

    def __post_init__(self) -> None:
        for name in ("devices", "global_batch", "memory", "flops", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be more than 0")
        if self.flops == inf:
            raise ConfigError(f"flops={self.flops}: must be finite; give what a device really does")
        check_amount("latency", self.latency)
        if self.max_drift < 0:
            raise ConfigError(f"max_drift={self.max_drift}: must be at least 0")
        if self.zero not in (0, 1):
            raise ConfigError(f"zero={self.zero}: pipelines run with ZeRO stage 0 or 1; take one of them")
        for stages in self.stages:
            if stages < 1 or self.devices % stages:
                raise ConfigError(f"stages={stages}: must divide the {self.devices} devices")
        for size in self.micro_batch_sizes:
            if size < 1 or self.global_batch % size:
                raise ConfigError(f"micro_batch_size={size}: must divide the global batch of {self.global_batch}")
        for name in self.schedules:
            schedule(name)
        interval_of(self.prediction)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to run the job."""

    schedule: str
    stages: int
    replicas: int
    micro_batch_size: int
    accumulation: int
    recompute: bool
    tokens_per_second: float = 0.0
    """The predicted speed of the whole job; 0 where the row is refused."""

    samples_per_second_per_device: float = 0.0
    speedup: float | None = None
    """The speed relative to 1f1b with the same stages, micro-batch size and recompute; None without such a row."""

    memory: float = 0.0
    """Bytes of the fullest stage."""

    drift: int = 0
    """The bound of the drift at the first stage."""

    layers: list[int] = field(default_factory=list)
    """How many layers each stage holds."""

    predictions: int = 0
    """How often the first stage predicts its weights in an update.  Each prediction takes as long as an optimizer step;
    the plan counts only the part of it that replicas spend on sending."""

    refused: str = ""
    """Why the row cannot be run; empty where it can."""

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where each stage begins and the last one ends: stage s has the layers bounds[s] to bounds[s + 1] - 1."""
        return tuple(accumulate(self.layers, initial=0))


def search(job: Job) -> list[Row]:
    """All rows: first those that can run, beginning with the fastest, then the refused ones with their reasons.

    On one stage every schedule is plain gradient accumulation; such rows appear once, as 1f1b.
    """
    table = _Table(job)
    rows = [
        table.row(name, *shape) for shape in _shapes(job) for name in job.schedules if shape[0] > 1 or name == "1f1b"
    ]  # on one stage all schedules are gradient accumulation
    baseline = {_place(row): row.tokens_per_second for row in rows if row.schedule == "1f1b" and not row.refused}
    rows = [
        replace(row, speedup=row.tokens_per_second / baseline[_place(row)])
        if _place(row) in baseline and not row.refused
        else row
        for row in rows
    ]
    return sorted(rows, key=_rank)


def calibrated(job: Job, samples_per_second_per_device: float) -> Job:
    """The same job on devices that are as fast as a measured run with 1f1b showed them to be.

    The job's `stages` and `micro_batch_sizes` must name that run.

    Raises:
        ConfigError: the job does not name one run, 1f1b cannot run there, or the links by themselves take longer than
            the measured run.
    """
    if not samples_per_second_per_device > 0:
        raise ConfigError(f"measured={samples_per_second_per_device}: must be more than 0")
    shapes = [shape for shape in _shapes(job) if not shape[-1]]
    if len(shapes) != 1:
        raise ConfigError(
            f"measured: {len(shapes)} pipelines match; name the measured one's stages and micro-batch size"
        )
    for _ in range(60):
        row = _Table(replace(job, memory=inf)).row("1f1b", *shapes[0])
        if row.refused:
            raise ConfigError(f"measured: 1f1b cannot run there ({row.refused}); name the measured run's stages")
        ratio = samples_per_second_per_device / row.samples_per_second_per_device
        if abs(ratio - 1) < 1e-9:
            return job
        job = replace(job, flops=job.flops * ratio)
    raise ConfigError(
        f"measured={samples_per_second_per_device}: cannot be reached with this bandwidth and latency; correct these"
    )


def _rank(row: Row) -> tuple[bool, float, float, int]:
    """The key by which rows are sorted; speeds that differ only in rounding count as equal."""
    return bool(row.refused), -float(f"{row.tokens_per_second:.9g}"), row.memory, row.drift


def _place(row: Row) -> tuple[int, int, bool]:
    return row.stages, row.micro_batch_size, row.recompute


def _shapes(job: Job) -> Iterator[tuple[int, int, int, bool]]:
    """(stages, micro-batch size, accumulation, recompute) of every pipeline to search."""
    for stages in job.stages or _divisors(job.devices):
        share, rest = divmod(job.global_batch * stages, job.devices)
        if rest:
            continue  # the replicas cannot share the batch evenly
        sizes = job.micro_batch_sizes or [1 << power for power in range(share.bit_length())]
        for size in sizes:
            if share % size == 0:
                for recompute in job.recompute:
                    yield stages, size, share // size, recompute


def _divisors(number: int) -> list[int]:
    """All divisors, the smallest first."""
    small = [count for count in range(1, isqrt(number) + 1) if number % count == 0]
    return small + [number // count for count in reversed(small) if count * count != number]


class _Table:
    """The rows of a job; a partition that several of them share is searched once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._known: dict[tuple[Any, ...], Partition | NothingFitsError] = {}

    def row(self, name: str, stages: int, size: int, accumulation: int, recompute: bool) -> Row:
        """One row, simulated unless it is refused."""
        job, chosen, spec = self._job, schedule(name), PipelineSpec(stages=stages, accumulation=accumulation)
        replicas = job.devices // stages
        row = Row(
            schedule=name,
            stages=stages,
            replicas=replicas,
            micro_batch_size=size,
            accumulation=accumulation,
            recompute=recompute,
            drift=chosen.drift_bound(spec, 0),
            predictions=predictions_of_an_update(spec, 0, job.prediction) if "prediction" in chosen.options else 0,
        )
        reason = _impossible(job, chosen, spec, row)
        if reason:
            return replace(row, refused=reason)
        partition = self._partition(row, [_memory(job, chosen, spec, row, stage) for stage in range(stages)])
        if isinstance(partition, NothingFitsError):
            memory = max(partition.nearest.peak_bytes)
            return replace(row, memory=memory, refused=f"needs {memory / _GIB:.1f} GiB of {job.memory / _GIB:.1f}")
        held = [stop - start for start, stop in pairwise(partition.bounds)]
        row = replace(row, memory=max(partition.peak_bytes), layers=held)
        try:
            seconds = time_per_micro_batch(chosen, spec, _costs(job, spec, row, partition))
        except ConfigError as error:  # too many ops to simulate
            return replace(row, refused=str(error))
        samples = replicas * size / seconds
        return replace(
            row,
            tokens_per_second=samples * job.model.sequence_length,
            samples_per_second_per_device=samples / job.devices,
        )

    def _partition(self, row: Row, memories: Sequence[StageMemory]) -> Partition | NothingFitsError:
        """The fastest partition of the row's layers, or why there is none."""
        key = row.micro_batch_size, row.recompute, *memories
        if key not in self._known:
            layers = [layer.scaled(row.micro_batch_size, 1 / self._job.flops) for layer in self._job.model.layers]
            try:
                self._known[key] = balance(layers, memories, recompute_every=int(row.recompute))
            except NothingFitsError as error:
                self._known[key] = error
        return self._known[key]


def _impossible(job: Job, chosen: Schedule, spec: PipelineSpec, row: Row) -> str:
    """Why the row cannot run, whatever its memory; "" where it can."""
    if spec.stages * chosen.chunks > len(job.model.layers):
        return f"{spec.stages} stages with {chosen.chunks} chunks, and {len(job.model.layers)} layers"
    if row.recompute and chosen.splits_backward:
        return "recomputing in B would keep the activations that W needs after all"
    if row.drift > job.max_drift:
        return f"drift up to {row.drift}, limit {job.max_drift}"
    try:
        chosen.check(spec)
    except ConfigError as error:
        return str(error)
    return ""


def _memory(job: Job, chosen: Schedule, spec: PipelineSpec, row: Row, stage: int) -> StageMemory:
    """The memory of one stage."""
    optimizer = _OPTIMIZER / (row.replicas if job.zero else 1)
    versions = chosen.weight_versions(spec, stage)
    if row.predictions and interval_of(job.prediction) != 1 and spec.look_ahead(stage) > spec.accumulation:
        versions += 1  # a prediction that stands while DeepSpeed's train_batch returns the real weights
    return StageMemory(
        in_flight=chosen.in_flight(spec, stage) / chosen.chunks,
        bytes_per_parameter=_WEIGHT * versions + _GRADIENT + optimizer,
        limit=job.memory,
    )


def _costs(job: Job, spec: PipelineSpec, row: Row, partition: Partition) -> Costs:
    """The costs of ops and messages in this row, in seconds."""
    stages = [job.model.layers[start:stop] for start, stop in pairwise(partition.bounds)]
    speed = row.micro_batch_size / job.flops
    forward = [sum(layer.forward for layer in layers) * speed for layers in stages]
    turn = (row.replicas - 1) / row.replicas / job.bandwidth  # of one byte of every parameter, around the ring
    gathers = [_gathers(job, spec, stage) if row.predictions else 0 for stage in range(spec.stages)]
    return Costs(
        forward=forward,
        backward=[whole - early for whole, early in zip(partition.seconds, forward, strict=True)],
        step=[
            sum(layer.parameters for layer in layers) * turn * (2 * _GRADIENT + _WEIGHT * count)
            for layers, count in zip(stages, gathers, strict=True)
        ],
        latency=job.latency,
        bandwidth=job.bandwidth,
        message_bytes=job.model.layers[-1].input_bytes * row.micro_batch_size,
    )


def _gathers(job: Job, spec: PipelineSpec, stage: int) -> int:
    """How often in an update a stage's replicas gather weights: those of a prediction, and the real ones after it."""
    made = predictions_of_an_update(spec, stage, job.prediction)
    return 2 * made if interval_of(job.prediction) == 1 else made + min(made, 1)

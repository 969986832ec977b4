"""Which pipeline for this job?  Every division of the devices and every schedule, with speed, memory and drift.

A stage's time is the sum of its layers', cut so that the slowest stage is as fast as possible.  Data-parallel replicas
average their gradients in a ring when a stage steps.  Memory is weights (bf16), gradients and optimizer state (fp32;
AdamW's two moments and the master copy, divided over the replicas under ZeRO-1), stashed weights, and the activations
in flight.  Predicted weights are written over the bf16 ones; replicas gather them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isqrt

from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.schedules.registry import SCHEDULES, schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.core.staleness import interval_of, predictions_of_an_update
from paci_schedule.errors import ConfigError
from paci_schedule.plan.transformer import Layer, Model
from paci_schedule.simulate.costs import Costs, check_amount
from paci_schedule.simulate.figures import time_per_micro_batch

__all__ = ["Job", "Row", "calibrated", "deepspeed_config", "megatron_flags", "pipeline_module", "plan"]

_GIB = 2**30
_WEIGHT, _GRADIENT, _OPTIMIZER = 2, 4, 12  # bytes a parameter


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, on what, and what may be searched.

    Raises:
        ConfigError: a value has no sense.
    """

    model: Model
    """The layers."""

    devices: int
    """How many, all alike."""

    memory: float
    """Bytes of one device."""

    global_batch: int
    """Sequences of an optimizer update."""

    flops: float = 1.0
    """Floating-point operations that a device does in a second; of measured layers, how many times as fast a device is
    as they say."""

    bandwidth: float = float("inf")
    """Bytes a second between two devices."""

    latency: float = 0.0
    """Seconds of a message."""

    zero: int = 1
    """ZeRO stage of the optimizer state: 0 or 1."""

    max_drift: int = 1
    """The most updates between a forward and its backward."""

    schedules: Sequence[str] = tuple(SCHEDULES)
    """Which schedules to look at."""

    stages: Sequence[int] = ()
    """Which numbers of stages; none means every divisor of `devices`."""

    micro_batch_sizes: Sequence[int] = ()
    """Which micro-batch sizes, in sequences; none means every power of 2 that divides a replica's share."""

    recompute: Sequence[bool] = (False, True)
    """Whether layers are recomputed in the backward."""

    prediction: str | int = "off"
    """When PACI's stale forwards predict their weights (`stale.interval_of`)."""

    def __post_init__(self) -> None:
        for name in ("devices", "global_batch", "memory", "flops", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be more than 0")
        if self.flops == inf:
            raise ConfigError(f"flops={self.flops}: must be finite; say what a device really does")
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
    """Predicted, of the whole job; 0 where the row is refused."""

    samples_per_second_per_device: float = 0.0
    speedup: float | None = None
    """Against 1f1b of the same stages, micro-batch size and recompute; None where that is not in the plan."""

    memory: float = 0.0
    """Bytes of the fullest stage."""

    drift: int = 0
    """The bound at the first stage."""

    layers: list[int] = field(default_factory=list)
    """How many layers each stage holds."""

    predictions: int = 0
    """Of weights, by the first stage for an update.  Each takes an optimizer step's time, of which the plan knows only
    what travels between replicas."""

    refused: str = ""
    """Why the row cannot be run; empty where it can."""


def plan(job: Job) -> list[Row]:
    """All rows: those that can run, the fastest first, then the refused ones with their reasons.

    Jobs without a pipeline, on one stage, appear as 1f1b.
    """
    rows = [
        _row(job, name, *shape) for shape in _shapes(job) for name in job.schedules if shape[0] > 1 or name == "1f1b"
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
    """The job on devices as fast as a run with 1f1b showed; the job's `stages` and `micro_batch_sizes` name that run.

    Raises:
        ConfigError: the job does not name one run, or 1f1b cannot run there, or links alone take longer than measured.
    """
    if not samples_per_second_per_device > 0:
        raise ConfigError(f"measured={samples_per_second_per_device}: must be more than 0")
    shapes = [shape for shape in _shapes(job) if not shape[-1]]
    if len(shapes) != 1:
        raise ConfigError(
            f"measured: {len(shapes)} pipelines match; name the measured one's stages and micro-batch size"
        )
    for _ in range(60):
        row = _row(replace(job, memory=float("inf")), "1f1b", *shapes[0])
        if row.refused:
            raise ConfigError(f"measured: 1f1b cannot run there ({row.refused}); name the measured run's stages")
        ratio = samples_per_second_per_device / row.samples_per_second_per_device
        if abs(ratio - 1) < 1e-9:
            return job
        job = replace(job, flops=job.flops * ratio)
    raise ConfigError(f"measured={samples_per_second_per_device}: not to be reached with this bandwidth and latency")


def deepspeed_config(job: Job, row: Row) -> dict[str, object]:
    """The DeepSpeed JSON of a row; what else DeepSpeed must know is in `pipeline_module`."""
    return {
        "train_batch_size": job.global_batch,
        "train_micro_batch_size_per_gpu": row.micro_batch_size,
        "gradient_accumulation_steps": row.accumulation,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": job.zero},
        "pipeline_schedule": row.schedule,
    } | ({"paci": {"prediction": job.prediction}} if _predicts(job, row) else {})


def pipeline_module(row: Row) -> dict[str, int]:
    """The arguments of DeepSpeed's PipelineModule for a row."""
    return {"num_stages": row.stages} | ({"activation_checkpoint_interval": 1} if row.recompute else {})


def megatron_flags(job: Job, row: Row) -> list[str]:
    """The Megatron-LM flags of a row; the model's own are not among them."""
    flags = {
        "--pipeline-model-parallel-size": row.stages,
        "--micro-batch-size": row.micro_batch_size,
        "--global-batch-size": job.global_batch,
        "--seq-length": job.model.sequence_length,
        "--pipeline-schedule": row.schedule,
    }
    words = [word for flag, value in flags.items() for word in (flag, str(value))]
    words += ["--untie-embeddings-and-output-weights", "--bf16"]
    words += ["--rerun-mode", "disabled"] * (not schedule(row.schedule).flushes)
    words += ["--paci-prediction", str(job.prediction)] * _predicts(job, row)
    words += ["--use-distributed-optimizer"] * job.zero
    recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    return words + recompute * row.recompute


def _predicts(job: Job, row: Row) -> bool:
    return "prediction" in schedule(row.schedule).options and job.prediction != "off"


def _rank(row: Row) -> tuple[bool, float, float, int]:
    """What rows are sorted by; speeds that differ in their rounding alone are equal."""
    return bool(row.refused), -float(f"{row.tokens_per_second:.9g}"), row.memory, row.drift


def _place(row: Row) -> tuple[int, int, bool]:
    return row.stages, row.micro_batch_size, row.recompute


def _shapes(job: Job) -> Iterator[tuple[int, int, int, bool]]:
    """(stages, micro-batch size, accumulation, recompute) of everything to look at."""
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


def _row(job: Job, name: str, stages: int, size: int, accumulation: int, recompute: bool) -> Row:
    """One row, simulated unless it is refused."""
    chosen, spec = schedule(name), PipelineSpec(stages=stages, accumulation=accumulation)
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
    cut = _partition(job.model.layers, stages)
    memory = max(_stage_bytes(job, chosen, spec, row, stage, layers) for stage, layers in enumerate(cut))
    row = replace(row, memory=memory, layers=[len(layers) for layers in cut])
    if memory > job.memory:
        return replace(row, refused=f"needs {memory / _GIB:.1f} GiB of {job.memory / _GIB:.1f}")
    try:
        seconds = time_per_micro_batch(chosen, spec, _costs(job, spec, row, cut))
    except ConfigError as error:  # too many ops to simulate
        return replace(row, refused=str(error))
    samples = replicas * size / seconds
    return replace(
        row, tokens_per_second=samples * job.model.sequence_length, samples_per_second_per_device=samples / job.devices
    )


def _impossible(job: Job, chosen: Schedule, spec: PipelineSpec, row: Row) -> str:
    """Why the row cannot be, before looking at memory; "" where it can."""
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


def _partition(layers: Sequence[Layer], stages: int) -> list[Sequence[Layer]]:
    """The layers cut into `stages` parts so that the slowest part is as fast as possible; no part is empty."""
    times = [layer.forward + layer.backward for layer in layers]
    best: list[list[tuple[float, int]]] = [[(0.0, 0)] + [(float("inf"), 0)] * len(times)]
    for part in range(1, stages + 1):
        best.append([(float("inf"), 0)] * (len(times) + 1))
        for end in range(part, len(times) + 1):
            total = 0.0
            for begin in range(end - 1, part - 2, -1):
                total += times[begin]
                slowest = max(total, best[part - 1][begin][0])
                if slowest < best[part][end][0]:
                    best[part][end] = (slowest, begin)
                if total > best[part][end][0]:
                    break
    cuts, end = [], len(times)
    for part in range(stages, 0, -1):
        begin = best[part][end][1]
        cuts.append(layers[begin:end])
        end = begin
    return cuts[::-1]


def _stage_bytes(
    job: Job, chosen: Schedule, spec: PipelineSpec, row: Row, stage: int, layers: Sequence[Layer]
) -> float:
    """What one stage needs."""
    parameters = sum(layer.parameters for layer in layers)
    optimizer = _OPTIMIZER / (row.replicas if job.zero else 1)
    versions = chosen.weight_versions(spec, stage)
    if row.predictions and interval_of(job.prediction) != 1 and spec.look_ahead(stage) > spec.accumulation:
        versions += 1  # a prediction that stands while DeepSpeed's train_batch returns the real weights
    weights = parameters * (_WEIGHT * versions + _GRADIENT + optimizer)
    held = chosen.in_flight(spec, stage) / chosen.chunks
    if row.recompute:
        kept = held * sum(layer.input_bytes for layer in layers) + max(layer.activation_bytes for layer in layers)
    else:
        kept = held * sum(layer.activation_bytes for layer in layers)
    return weights + kept * row.micro_batch_size


def _costs(job: Job, spec: PipelineSpec, row: Row, cut: Sequence[Sequence[Layer]]) -> Costs:
    """What things take in this row, in seconds."""
    speed = row.micro_batch_size / job.flops
    forward = [sum(layer.forward for layer in layers) * speed for layers in cut]
    backward = [sum(layer.backward for layer in layers) * speed for layers in cut]
    turn = (row.replicas - 1) / row.replicas / job.bandwidth  # of one byte of every parameter, around the ring
    gathers = [_gathers(job, spec, stage) if row.predictions else 0 for stage in range(spec.stages)]
    return Costs(
        forward=forward,
        backward=[late + early * row.recompute for early, late in zip(forward, backward, strict=True)],
        step=[
            sum(layer.parameters for layer in layers) * turn * (2 * _GRADIENT + _WEIGHT * count)
            for layers, count in zip(cut, gathers, strict=True)
        ],
        latency=job.latency,
        bandwidth=job.bandwidth,
        message_bytes=job.model.layers[-1].input_bytes * row.micro_batch_size,
    )


def _gathers(job: Job, spec: PipelineSpec, stage: int) -> int:
    """How often a stage's replicas gather weights for the predictions of an update, and the real ones after them."""
    made = predictions_of_an_update(spec, stage, job.prediction)
    return 2 * made if interval_of(job.prediction) == 1 else made + min(made, 1)

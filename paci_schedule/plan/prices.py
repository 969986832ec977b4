"""What a row takes: the memory of its stages, and the times of its ops and messages.

A stage's memory holds weights (bf16), gradients and optimizer states (fp32; AdamW's two moments and the master copy,
divided over the replicas under ZeRO-1), the weights that its schedule stashes, and the activations in flight.
Predicted weights are written over the bf16 weights; replicas gather them.

The ranks of a stage's slices stand next to each other, then those of its replicas, then the next stage's.  Replicas
average their gradients in a ring when a stage steps, or, where that overlaps, while the last backward runs.
"""

from __future__ import annotations

from itertools import pairwise

from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.core.staleness import interval_of, predictions_of_an_update
from paci_schedule.plan.hardware import Link
from paci_schedule.plan.job import Job, Row
from paci_schedule.plan.layers import Layer
from paci_schedule.plan.partition import Partition, StageMemory
from paci_schedule.simulate.costs import Costs

__all__ = ["costs_of", "drifted_share", "memory_of"]

_WEIGHT, _GRADIENT, _OPTIMIZER = 2, 4, 12  # bytes a parameter
_MOVED = 30  # bytes a parameter that an optimizer step reads and writes


def memory_of(job: Job, chosen: Schedule, spec: PipelineSpec, row: Row, stage: int) -> StageMemory:
    """The memory of one stage."""
    optimizer = _OPTIMIZER / (row.replicas if job.zero else 1)
    versions = chosen.weight_versions(spec, stage)
    if row.predictions and interval_of(job.prediction) != 1 and spec.look_ahead(stage) > spec.accumulation:
        versions += 1  # a prediction that stands while DeepSpeed's train_batch returns the real weights
    return StageMemory(
        in_flight=chosen.in_flight(spec, stage) / chosen.chunks,
        bytes_per_parameter=_WEIGHT * versions + _GRADIENT + optimizer,
        limit=job.device.usable,
    )


def costs_of(job: Job, spec: PipelineSpec, row: Row, layers: list[Layer], partition: Partition) -> Costs:
    """The costs of ops and messages in this row, in seconds.

    Args:
        job, spec, row: what runs.
        layers: as they are on the row's devices.
        partition: of these layers; its seconds contain what is recomputed.
    """
    stages = [layers[start:stop] for start, stop in pairwise(partition.bounds)]
    forward = [sum(layer.forward for layer in held) for held in stages]
    backward = [whole - early for whole, early in zip(partition.seconds, forward, strict=True)]
    links = [_link(job, row, stage) for stage in range(row.stages - 1)]
    return Costs(
        forward=forward,
        backward=backward,
        step=[_step(job, spec, row, stage, held, backward[stage]) for stage, held in enumerate(stages)],
        latency=[link.latency for link in links],
        bandwidth=[link.bandwidth for link in links],
        message_bytes=max((held[-1].output_bytes for held in stages[:-1]), default=0.0),
    )


def drifted_share(chosen: Schedule, spec: PipelineSpec) -> float:
    """The share of the micro-batches, over all stages in steady state, whose backward comes an update later or more."""
    if chosen.flushes:
        return 0.0
    window = chosen.micro_batches_per_update(spec)
    return sum(min(spec.look_ahead(stage), window) for stage in range(spec.stages)) / (window * spec.stages)


def _link(job: Job, row: Row, stage: int) -> Link:
    """The slowest link between two neighbouring stages, over all replicas and slices."""
    width = row.replicas * row.slices
    ranks = range(stage * width, (stage + 1) * width)[: max(1, job.device.node)]  # the others are like these
    links = {job.device.link(rank, rank + width) for rank in ranks}
    return max(links, key=lambda link: (link.latency, -link.bandwidth))


def _step(job: Job, spec: PipelineSpec, row: Row, stage: int, layers: list[Layer], backward: float) -> float:
    """Seconds of an update of a stage: what its replicas send, and what its optimizer moves."""
    width, held = row.replicas * row.slices, sum(layer.parameters for layer in layers)
    turn = held * (row.replicas - 1) / row.replicas  # bytes around the ring for one byte of every parameter
    bandwidth = job.device.ring(range(stage * width, (stage + 1) * width)).bandwidth
    reduced = turn * 2 * _GRADIENT / bandwidth
    gathered = turn * _WEIGHT * (_gathers(job, spec, stage) if row.predictions else 0) / bandwidth
    moved = _MOVED * held / (row.replicas if job.zero else 1) / job.device.memory_bandwidth
    return max(0.0, reduced - backward * job.overlap) + gathered + moved


def _gathers(job: Job, spec: PipelineSpec, stage: int) -> int:
    """How often in an update a stage's replicas gather weights: those of a prediction, and the real ones after it."""
    made = predictions_of_an_update(spec, stage, job.prediction)
    return 2 * made if interval_of(job.prediction) == 1 else made + min(made, 1)

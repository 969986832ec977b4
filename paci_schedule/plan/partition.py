"""The partition of a row of layers into stages: the slowest stage is as fast as the memory of the stages allows.

Without a bubble a pipeline is as fast as its slowest stage, that is, as the seconds that the stage's layers take for
the forward and the backward of one micro-batch.  A stage holds the state of its layers once, and what they keep between
forward and backward once for every micro-batch in flight.  Under PACI and 1F1B the first stage has P micro-batches in
flight and the last stage one, so where memory is short, the early stages get fewer layers.

The search is exact: a dynamic programme over (stage, layers so far), O(P n^2) for n layers.  Among the partitions with
the fastest slowest stage it takes one with the least sum of squares of the stages' seconds, so that the other stages
are even too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError
from paci_schedule.plan.layers import Layer

__all__ = [
    "NothingFitsError",
    "Partition",
    "StageMemory",
    "balance",
    "check_bounds",
    "evaluate",
    "memory_of_stages",
    "parameters_of_stages",
]


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """What one stage holds in memory, and how much it may hold."""

    in_flight: float
    """The micro-batches that the stage holds at once."""

    bytes_per_parameter: float = 16.0
    """Weight, gradient and optimizer states of a trained parameter together: 16 for Adam in fp32, and for bf16 weights
    and gradients with Adam on fp32 copies."""

    limit: float = math.inf
    """The bytes that the stage may take."""


@dataclass(frozen=True)
class Partition:
    """Which layers make which stage, and what that costs.

    Attributes:
        bounds: P + 1 numbers from 0 to n; stage s has the layers bounds[s] to bounds[s + 1] - 1.
        seconds: what one micro-batch takes on each stage, forward and backward together.
        peak_bytes: the most memory that each stage takes (see `evaluate`).
    """

    bounds: tuple[int, ...]
    seconds: tuple[float, ...]
    peak_bytes: tuple[float, ...]

    @property
    def slowest(self) -> float:
        """Seconds of the slowest stage: what a micro-batch takes in a pipeline without bubbles."""
        return max(self.seconds)

    @property
    def ideal(self) -> float:
        """Seconds of every stage if the layers could be divided evenly: sum / P."""
        return sum(self.seconds) / len(self.seconds)

    def __str__(self) -> str:
        rows = [
            f"  stage {stage}: layers {start} to {stop - 1}, {1e3 * seconds:.4g} ms a micro-batch, {_size(peak)}"
            for stage, ((start, stop), seconds, peak) in enumerate(
                zip(pairwise(self.bounds), self.seconds, self.peak_bytes, strict=True)
            )
        ]
        even = self.ideal / self.slowest if self.slowest else 1.0
        return "\n".join([f"partition {list(self.bounds)}, the slowest stage at {even:.3f} of the ideal speed", *rows])


class NothingFitsError(ConfigError):
    """No partition keeps to the memory limits.

    Attributes:
        nearest: the partition that comes nearest to them.
    """

    def __init__(self, nearest: Partition, memories: Sequence[StageMemory]) -> None:
        short = [
            f"stage {stage} needs {_size(peak)} of {_size(memory.limit)}"
            for stage, (peak, memory) in enumerate(zip(nearest.peak_bytes, memories, strict=True))
            if peak > memory.limit
        ]
        super().__init__(
            f"memory_limit: no partition keeps to it; in the nearest, {list(nearest.bounds)}, {', '.join(short)}; "
            "use more stages, smaller micro-batches, recomputation or less extra_in_flight"
        )
        self.nearest = nearest


def memory_of_stages(
    spec: PipelineSpec, *, bytes_per_parameter: float = 16.0, memory_limit: float | Sequence[float] | None = None
) -> list[StageMemory]:
    """The memory of each stage under PACI or 1F1B.

    Args:
        spec: the pipeline; its stages and its micro-batches in flight count.
        bytes_per_parameter: as in `StageMemory`.
        memory_limit: bytes, one number for every stage or one for each of them; None for no limit.

    Raises:
        ConfigError: the limit is malformed.
    """
    limit_of_all = math.inf if memory_limit is None else memory_limit
    limits = limit_of_all if isinstance(limit_of_all, Sequence) else [limit_of_all] * spec.stages
    if len(limits) != spec.stages or any(not limit > 0 for limit in limits):
        raise ConfigError(
            f"memory_limit={memory_limit!r}: must be bytes above 0, or {spec.stages} of them, one for each stage"
        )
    return [
        StageMemory(
            in_flight=spec.in_flight(stage),
            bytes_per_parameter=bytes_per_parameter,
            limit=limit,
        )
        for stage, limit in enumerate(limits)
    ]


def balance(layers: Sequence[Layer], memories: Sequence[StageMemory], *, recompute_every: int = 0) -> Partition:
    """The partition with the fastest slowest stage, in which every stage has at least one layer.

    Args:
        layers: those of the whole model, in order.
        memories: the memory of each stage; there are as many stages as memories.
        recompute_every: as in `evaluate`.

    Raises:
        ConfigError: there are fewer layers than stages, or `recompute_every` is malformed.
        NothingFitsError: no partition keeps to the limits.
    """
    count, stages = len(layers), len(memories)
    if count < stages:
        raise ConfigError(f"{count} layers for {stages} stages: every stage needs at least one; use fewer stages")
    table = _table(layers, recompute_every)

    def seconds_up_to(most: float) -> Iterator[np.ndarray]:
        for memory in memories:
            fits = (table.peak_bytes(memory) <= memory.limit) & (table.seconds <= most)
            yield np.where(fits, table.seconds, np.inf)

    slowest, _ = _least(seconds_up_to(math.inf), np.maximum)
    if math.isinf(slowest):
        exists = np.isfinite(table.seconds)
        _, bounds = _least(
            (np.where(exists, table.peak_bytes(memory) - memory.limit, np.inf) for memory in memories), np.maximum
        )
        raise NothingFitsError(evaluate(layers, memories, bounds, recompute_every=recompute_every), memories)
    _, bounds = _least((seconds**2 for seconds in seconds_up_to(slowest)), np.add)
    return evaluate(layers, memories, bounds, recompute_every=recompute_every)


def evaluate(
    layers: Sequence[Layer], memories: Sequence[StageMemory], bounds: Sequence[int], *, recompute_every: int = 0
) -> Partition:
    """A given partition, with its costs.

    A stage's peak has three parts: the state of its layers; for each micro-batch in flight what the stage received, its
    layers' inputs, what they save and what it handed on; and, once, what the most demanding layer needs while it runs
    (with recomputation, together with what its chunk saves while it is run again).  The peak does not contain what an
    optimizer takes besides its states, messages on their way, or what an allocator wastes.

    Args:
        layers: those of the whole model, in order.
        memories: the memory of each stage.
        bounds: where the stages begin and end, as in `Partition`.
        recompute_every: how many layers of a stage are recomputed together in the backward, so that only the input of
            the first of them is kept (DeepSpeed: activation_checkpoint_interval; a chunk without parameters is not
            recomputed); 0 for none.

    Raises:
        ConfigError: `bounds` do not divide these layers into these stages, or `recompute_every` is malformed.
    """
    check_bounds(bounds, len(layers), len(memories))
    spans = [list(_spans_from(layers[start:stop], recompute_every))[-1] for start, stop in pairwise(bounds)]
    return Partition(
        bounds=tuple(bounds),
        seconds=tuple(span.seconds for span in spans),
        peak_bytes=tuple(span.peak_bytes(memory) for span, memory in zip(spans, memories, strict=True)),
    )


def parameters_of_stages(layers: Sequence[Layer], bounds: Sequence[int]) -> list[float]:
    """The trained parameters of each stage of a partition."""
    return [list(_spans_from(layers[start:stop], 0))[-1].parameters for start, stop in pairwise(bounds)]


def check_bounds(bounds: Sequence[int], layers: int, stages: int) -> None:
    """Raises ConfigError unless `bounds` divide so many layers into so many stages, none of them empty."""
    rises = all(start < stop for start, stop in pairwise(bounds))
    if len(bounds) != stages + 1 or bounds[0] != 0 or bounds[-1] != layers or not rises:
        raise ConfigError(
            f"partition {list(bounds)!r}: {layers} layers in {stages} stages need {stages + 1} bounds that rise from 0 "
            f"to {layers}, where each stage begins and the last one ends"
        )


class _Span(NamedTuple):
    """What layers that stand together in a stage cost; in `_table` the fields are arrays."""

    seconds: Any
    parameters: Any
    frozen: Any
    live: Any  # bytes for each micro-batch in flight
    running: Any  # bytes once, while a layer or a recomputed chunk runs

    def peak_bytes(self, memory: StageMemory) -> Any:
        state = memory.bytes_per_parameter * self.parameters + self.frozen
        return state + memory.in_flight * self.live + self.running


def _table(layers: Sequence[Layer], recompute_every: int) -> _Span:
    """The layers from start to stop - 1, float64[start, stop]; where there are none, the seconds are infinite."""
    count = len(layers)
    table = np.zeros((len(_Span._fields), count + 1, count + 1))
    table[0] = np.inf
    for start in range(count):
        table[:, start, start + 1 :] = np.array(list(_spans_from(layers[start:], recompute_every))).T
    return _Span(*table)


def _spans_from(layers: Sequence[Layer], recompute_every: int) -> Iterator[_Span]:
    """The first layer, the first two, and so on to all of `layers`."""
    if not isinstance(recompute_every, int) or recompute_every < 0:
        raise ConfigError(f"recompute_every={recompute_every!r}: must be a whole number of layers, 0 for none")
    seconds = parameters = frozen = live = running = 0
    chunk: list[Layer] = []
    tied: set[str] = set()
    for layer in layers:
        if len(chunk) == (recompute_every or 1):
            took, kept, once = _chunk(chunk, bool(recompute_every))
            seconds, live, running = seconds + took, live + kept, max(running, once)
            chunk.clear()
        chunk.append(layer)
        if layer.tied in tied:
            parameters += layer.own_parameters
        else:
            parameters, frozen = parameters + layer.parameters, frozen + layer.frozen_bytes
        if layer.tied is not None:
            tied.add(layer.tied)
        took, kept, once = _chunk(chunk, bool(recompute_every))
        passing = layers[0].input_bytes + layer.output_bytes
        yield _Span(seconds + took, parameters, frozen, live + kept + passing, max(running, once))


def _chunk(chunk: Sequence[Layer], recompute: bool) -> tuple[float, float, float]:
    """Seconds, bytes kept for each micro-batch, and bytes needed once, while it runs."""
    forward, backward = sum(layer.forward for layer in chunk), sum(layer.backward for layer in chunk)
    saved = sum(layer.input_bytes + layer.saved_bytes for layer in chunk)
    workspace = max(layer.workspace_bytes for layer in chunk)
    if recompute and any(layer.parameters or layer.frozen_bytes for layer in chunk):
        return 2 * forward + backward, chunk[0].input_bytes, saved - chunk[0].input_bytes + workspace
    return forward + backward, saved, workspace


def _least(weights: Iterable[np.ndarray], join: np.ufunc) -> tuple[float, tuple[int, ...]]:
    """The partition whose joined stage weights are least: what they join to, infinite if there is none, and its bounds.

    Args:
        weights: for each stage, float64[start, stop]: the weight of the layers from start to stop - 1 as that stage;
            infinite where they may not be one.
        join: of the weights so far and the next stage's; must not fall when the former rise.
    """
    weights = iter(weights)
    reached = next(weights)[0]  # [stop]
    begins: list[np.ndarray] = []  # of each later stage, by where it ends
    for weight in weights:
        joined = join(reached[:, None], weight)
        begins.append(joined.argmin(axis=0))
        reached = joined.min(axis=0)
    bounds = [len(reached) - 1]
    for begin in reversed(begins):
        bounds.append(int(begin[bounds[-1]]))
    return float(reached[-1]), (0, *reversed(bounds))


def _size(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"

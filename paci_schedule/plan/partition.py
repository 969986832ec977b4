"""Cut a row of layers into stages: the slowest stage as fast as it can be, within the memory of every stage.

With no bubble left, a pipeline is as fast as its slowest stage: the seconds that its layers take for one micro-batch,
forward and backward.  A stage's memory is its layers' state, once, and what they keep between the forward and the
backward of a micro-batch, as often as micro-batches are live there (`PipelineSpec.in_flight`): the first stage keeps P
of them, the last one.  So where memory is short, the early stages get fewer layers.

The search is exact: a dynamic programme over (stage, layers so far), O(P n^2) for n layers.  Of all cuts with the
fastest slowest stage it takes one with the least sum of squares of the stages' seconds: the other stages are even too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError

__all__ = ["Cut", "LayerCost", "balance", "check_bounds", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one layer costs the stage that it is in.

    Raises:
        ConfigError: a number is negative or not finite.
    """

    forward: float
    """Seconds for one micro-batch."""

    backward: float
    """Seconds for one micro-batch."""

    input_bytes: int = 0
    """Of what it gets from the layer before, for one micro-batch; kept until the backward."""

    saved_bytes: int = 0
    """What it keeps for its backward besides its input and its output, for one micro-batch."""

    workspace_bytes: int = 0
    """What it takes besides, while its forward or backward runs."""

    output_bytes: int = 0
    """Of what it hands on; counts where a stage ends, within a stage it is the next layer's input."""

    state_bytes: int = 0
    """Weights, gradients and optimizer states; 0 marks a layer without parameters."""

    tied: str | None = None
    """The key of a layer that shares its parameters with others; a stage holds them once for each key."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "tied" and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{field.name}={value!r}: a layer's cost must be finite and at least 0")


@dataclass(frozen=True)
class Cut:
    """Which layers make which stage, and what that costs.

    Attributes:
        bounds: P + 1 numbers from 0 to n; stage s has the layers bounds[s] to bounds[s + 1] - 1.
        seconds: of each stage for one micro-batch, forward and backward.
        peak_bytes: of each stage, see `evaluate`.
    """

    bounds: tuple[int, ...]
    seconds: tuple[float, ...]
    peak_bytes: tuple[int, ...]

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
        return "\n".join([f"cut {list(self.bounds)}, the slowest stage at {even:.3f} of the ideal speed", *rows])


def balance(
    layers: Sequence[LayerCost],
    spec: PipelineSpec,
    *,
    memory_limit: int | Sequence[int] | None = None,
    recompute_every: int = 0,
) -> Cut:
    """The cut with the fastest slowest stage, every stage with at least one layer.

    Args:
        layers: of the whole model, in order.
        spec: the pipeline; its stages and its micro-batches in flight count.
        memory_limit: bytes, of every stage or one number for each; None for no limit.
        recompute_every: as in `evaluate`.

    Raises:
        ConfigError: fewer layers than stages, a malformed limit, or no cut that keeps to it.
    """
    count, stages = len(layers), spec.stages
    if count < stages:
        raise ConfigError(f"{count} layers for {stages} stages: every stage needs at least one; use fewer stages")
    limits = _limits(memory_limit, stages)
    spans = _spans(layers, recompute_every)

    def excess(stage: int, span: _Span) -> float:
        return span.peak_bytes(spec.in_flight(stage)) - limits[stage]

    def search(weight: Callable[[int, _Span], float | None], join: Callable[[float, float], float]) -> tuple | None:
        return _least(lambda stage, start, stop: weight(stage, spans[start][stop]), join, count, stages)

    found = search(lambda stage, span: span.seconds if excess(stage, span) <= 0 else None, max)
    if found is None:
        _, bounds = search(excess, max)
        raise _nothing_fits(evaluate(layers, spec, bounds, recompute_every=recompute_every), limits)
    slowest, _ = found

    def square(stage: int, span: _Span) -> float | None:
        return span.seconds**2 if span.seconds <= slowest and excess(stage, span) <= 0 else None

    _, bounds = search(square, lambda total, one: total + one)
    return evaluate(layers, spec, bounds, recompute_every=recompute_every)


def evaluate(
    layers: Sequence[LayerCost], spec: PipelineSpec, bounds: Sequence[int], *, recompute_every: int = 0
) -> Cut:
    """What a given cut costs.

    A stage's peak is the state of its layers; for each micro-batch in flight what it received, its layers' inputs, what
    they save and what it handed on; and once what the layer that takes most needs while it runs, with recomputation
    together with what its chunk saves while it is redone.  Not in it: what an optimizer takes besides its states,
    messages on their way, an allocator's waste.

    Args:
        layers: of the whole model, in order.
        spec: the pipeline.
        bounds: where the stages begin and end, as in `Cut`.
        recompute_every: layers of a stage that are recomputed together in the backward, keeping the input of the first
            alone (DeepSpeed: activation_checkpoint_interval; a chunk without parameters is not recomputed); 0 for none.

    Raises:
        ConfigError: `bounds` do not cut these layers into this pipeline's stages, or a malformed `recompute_every`.
    """
    check_bounds(bounds, len(layers), spec.stages)
    spans = [list(_spans_from(layers[start:stop], recompute_every))[-1] for start, stop in pairwise(bounds)]
    return Cut(
        bounds=tuple(bounds),
        seconds=tuple(span.seconds for span in spans),
        peak_bytes=tuple(span.peak_bytes(spec.in_flight(stage)) for stage, span in enumerate(spans)),
    )


def check_bounds(bounds: Sequence[int], layers: int, stages: int) -> None:
    """Raises ConfigError unless `bounds` cut so many layers into so many stages, none of them empty."""
    rises = all(start < stop for start, stop in pairwise(bounds))
    if len(bounds) != stages + 1 or bounds[0] != 0 or bounds[-1] != layers or not rises:
        raise ConfigError(
            f"cut {list(bounds)!r}: {layers} layers in {stages} stages need {stages + 1} bounds that rise from 0 to "
            f"{layers}, where each stage begins and the last one ends"
        )


@dataclass(frozen=True)
class _Span:
    """Layers that stand together in a stage."""

    seconds: float
    state: int
    live: int  # for each micro-batch in flight
    running: int  # once, while a layer or a recomputed chunk runs

    def peak_bytes(self, in_flight: int) -> int:
        return self.state + in_flight * self.live + self.running


def _spans(layers: Sequence[LayerCost], recompute_every: int) -> list[dict[int, _Span]]:
    """For every start, stop -> the layers from start to stop - 1."""
    return [
        dict(enumerate(_spans_from(layers[start:], recompute_every), start=start + 1)) for start in range(len(layers))
    ]


def _spans_from(layers: Sequence[LayerCost], recompute_every: int) -> Iterator[_Span]:
    """The first layer, the first two, and so on to all of `layers`."""
    if not isinstance(recompute_every, int) or recompute_every < 0:
        raise ConfigError(f"recompute_every={recompute_every!r}: must be a whole number of layers, 0 for none")
    seconds, state, live, running = 0.0, 0, 0, 0
    chunk: list[LayerCost] = []
    tied: set[str] = set()
    for layer in layers:
        if len(chunk) == (recompute_every or 1):
            took, kept, once = _chunk(chunk, bool(recompute_every))
            seconds, live, running = seconds + took, live + kept, max(running, once)
            chunk.clear()
        chunk.append(layer)
        if layer.tied not in tied:
            state += layer.state_bytes
        if layer.tied is not None:
            tied.add(layer.tied)
        took, kept, once = _chunk(chunk, bool(recompute_every))
        passing = layers[0].input_bytes + layer.output_bytes
        yield _Span(seconds + took, state, live + kept + passing, max(running, once))


def _chunk(chunk: Sequence[LayerCost], recompute: bool) -> tuple[float, int, int]:
    """Seconds, bytes kept for each micro-batch, and bytes needed once, while it runs."""
    forward, backward = sum(layer.forward for layer in chunk), sum(layer.backward for layer in chunk)
    saved = sum(layer.input_bytes + layer.saved_bytes for layer in chunk)
    workspace = max(layer.workspace_bytes for layer in chunk)
    if recompute and any(layer.state_bytes for layer in chunk):
        return 2 * forward + backward, chunk[0].input_bytes, saved - chunk[0].input_bytes + workspace
    return forward + backward, saved, workspace


def _least(
    weight: Callable[[int, int, int], float | None],
    join: Callable[[float, float], float],
    count: int,
    stages: int,
) -> tuple[float, tuple[int, ...]] | None:
    """The cut whose joined stage weights are least, and they; None if there is no cut.

    Args:
        weight: of the layers from start to stop - 1 as a stage: weight(stage, start, stop); None where they may not be.
        join: of the weights so far and the next stage's; must not fall when the former rise.
        count: n, layers.
        stages: P.
    """
    reached: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(stages):
        left = stages - 1 - stage
        before, reached = reached, {}
        for stop in range(stage + 1, count - left + 1) if left else [count]:
            for start, (total, bounds) in before.items():
                one = weight(stage, start, stop) if start < stop else None
                if one is None:
                    continue
                joined = join(total, one) if stage else one
                if stop not in reached or joined < reached[stop][0]:
                    reached[stop] = joined, (*bounds, stop)
    return reached.get(count)


def _limits(memory_limit: int | Sequence[int] | None, stages: int) -> Sequence[float]:
    if memory_limit is None:
        return [math.inf] * stages
    limits = list(memory_limit) if isinstance(memory_limit, Sequence) else [memory_limit] * stages
    if len(limits) != stages or any(not limit > 0 for limit in limits):
        raise ConfigError(f"memory_limit={memory_limit!r}: must be bytes above 0, or {stages} of them, one a stage")
    return limits


def _nothing_fits(nearest: Cut, limits: Sequence[float]) -> ConfigError:
    """Says what the cut that comes nearest to the limits lacks."""
    short = [
        f"stage {stage} needs {_size(peak)} of {_size(limit)}"
        for stage, (peak, limit) in enumerate(zip(nearest.peak_bytes, limits, strict=True))
        if peak > limit
    ]
    return ConfigError(
        f"memory_limit: no cut keeps to it; in the nearest, {list(nearest.bounds)}, {', '.join(short)}; "
        "use more stages, smaller micro-batches, recomputation or less extra_in_flight"
    )


def _size(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"

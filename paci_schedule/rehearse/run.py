"""Training under a schedule in one process: every op of the core's streams runs as soon as its inputs exist.

What is computed depends only on the order of each stage's own ops and on the data that flows between stages.  Any order
that keeps both therefore gives the same results as a pipeline of real ranks.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.schedules.one_f_one_b import OneFOneB
from paci_schedule.core.schedules.paci import Paci
from paci_schedule.core.schedules.pipedream import PipeDream
from paci_schedule.core.schedules.pipedream_2bw import PipeDream2BW
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.core.staleness import check_reach, interval_of
from paci_schedule.errors import ConfigError, UnsupportedError, nearest
from paci_schedule.predict import Prediction, SteppedWeights, check
from paci_schedule.rehearse.norms import Norms
from paci_schedule.rehearse.owners import as_lists, check_owners
from paci_schedule.rehearse.stage import Stage
from paci_schedule.rehearse.stash import Stash

__all__ = ["REHEARSABLE", "Update", "check_warmup", "rehearse"]

_ENDLESS = 1 << 40  # batches; their number is known only when they end


class _Kind(NamedTuple):
    """A schedule, and the stash of weights that its ops read; None where they read the weights as they are."""

    schedule: Schedule
    stash: Callable[[Sequence[nn.Parameter]], Stash] | None = None


def _stash(parameters: Sequence[nn.Parameter]) -> Stash:
    return Stash(parameters, delayed=False)


def _two_versions(parameters: Sequence[nn.Parameter]) -> Stash:
    return Stash(parameters, delayed=True)


REHEARSABLE: Mapping[str, _Kind] = MappingProxyType(
    {
        "flush": _Kind(OneFOneB()),
        "paci": _Kind(Paci()),
        "paci-stash": _Kind(Paci(), _stash),
        "pipedream": _Kind(PipeDream(), _stash),
        "pipedream-2bw": _Kind(PipeDream2BW(), _two_versions),
    }
)
"""The schedules that can be rehearsed, by name."""


@dataclass(frozen=True)
class Update:
    """One update of the last stage.

    Attributes:
        update: its number, from 0.
        drift: for each stage the largest drift up to the end of the update's batch; drift is the number of updates
            between the forward and the backward of a micro-batch.
    """

    update: int
    drift: list[int]
    _losses: list[torch.Tensor] = field(repr=False)

    @property
    def loss(self) -> float:
        """The mean loss of the update's micro-batches at the last stage.  Reading the loss waits for the device."""
        return torch.stack(self._losses).float().mean().item()


def rehearse(
    stages: Sequence[nn.Module],
    optimizers: Sequence[Any],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    batches: Iterable[Sequence[tuple[Any, Any]]],
    *,
    schedule: str = "paci",
    accumulation: int,
    extra_in_flight: int | tuple[int, ...] = 0,
    prediction: str | int = "off",
    prediction_reach: float = 1.0,
    flush_warmup_steps: int = 0,
    clip: float = 0.0,
    schedulers: Sequence[Any] | None = None,
) -> Iterator[Update]:
    """Train `stages` as a pipeline with this schedule would.

    Args:
        stages: the model as a row of modules, from first to last, all on one device.  A module takes what the one
            before it returns, a tensor or a tuple.
        optimizers: for each stage one optimizer, or a list of several; an empty list for a stage that trains nothing.
        loss_fn: (output of the last stage, labels) -> the mean loss of a micro-batch, a scalar.
        batches: every batch is a sequence of `accumulation` pairs (inputs, labels) on the stages' device.
        schedule: "flush" (1F1B, a flush after every batch), "paci", "paci-stash" (PACI's stream, but each backward
            reads its forward's weights), "pipedream" (the same, with an update after every micro-batch) or
            "pipedream-2bw".
        accumulation: a, the number of micro-batches in a batch.
        extra_in_flight: k, as in `PipelineSpec`; only for "paci" and "paci-stash".
        prediction: when "paci" predicts the weights of stale forwards: "off", "window", "every" or a whole number k
            (`predict.prediction`).
        prediction_reach: how far along the expected update the predicted weights lie, with "every": 1 is the next
            weights, 1.5 half an update further.
        flush_warmup_steps: how many of the first updates run under "flush"; only for "paci".
        clip: the largest global gradient norm; 0 for no clipping.  Under "flush" the norm is exact; under the others,
            the parts of other stages are as old as the norms that messages carry (`rehearse.norms`).
        schedulers: learning-rate schedules, given like `optimizers`; they are stepped after each update.

    Yields:
        One `Update` for each update of the last stage, after the batch in which it falls.  At every yield, and at the
        end, the stages hold the real weights, not predicted ones.  At the end of the last batch the pipe is drained.

    Raises:
        ConfigError: a value is out of its range, or a batch does not have `accumulation` pairs.
        UnsupportedError: several stages share a weight, or the options cannot be combined.
    """
    if schedule not in REHEARSABLE:
        raise ConfigError(f"schedule={schedule!r}: must be one of {nearest(str(schedule), REHEARSABLE)}")
    stages = list(stages)
    spec = PipelineSpec(stages=len(stages), accumulation=accumulation, extra_in_flight=extra_in_flight)
    kind = REHEARSABLE[schedule]
    kind.schedule.check(spec)
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0 <= clip < float("inf"):
        raise ConfigError(f"clip={clip!r}: must be a number of at least 0; 0 means no clipping")
    interval = interval_of(prediction)
    check_reach(prediction_reach, prediction)
    if interval is not None and kind.stash is not None:
        raise UnsupportedError(
            f"prediction={prediction!r} with schedule={schedule!r}: its backwards read the weights of their forwards, "
            "so there is nothing to predict; switch prediction off, or take paci"
        )
    check_warmup(flush_warmup_steps, schedule)
    owned = as_lists("optimizers", optimizers, len(stages))
    check_owners(stages, owned)
    stepped = as_lists("schedulers", [[]] * len(stages) if schedulers is None else schedulers, len(stages))
    for optimizer in itertools.chain(*owned) if interval is not None else ():
        check(optimizer, prediction_reach)
    per_update = kind.schedule.micro_batches_per_update(spec)
    built = []
    for number, module in enumerate(stages):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        built.append(
            Stage(
                number,
                module,
                owned[number],
                stepped[number],
                per_update,
                loss_fn if number == len(stages) - 1 else None,
                None if kind.stash is None else kind.stash(trained),
                None if interval is None else Prediction(SteppedWeights(owned[number]), interval, prediction_reach),
            )
        )
    norms = Norms(replace(spec, accumulation=per_update), None if kind.schedule.flushes else flush_warmup_steps)
    return _Rehearsal(spec, kind.schedule, flush_warmup_steps, built, norms, float(clip)).run(batches)


def check_warmup(steps: object, schedule: str) -> None:
    """Raises ConfigError unless so many of the first updates can run under a flush."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ConfigError(f"flush_warmup_steps={steps!r}: must be a whole number of updates of at least 0")
    if steps and schedule != "paci":
        raise ConfigError(f"flush_warmup_steps={steps} with schedule={schedule!r}: has no meaning; take paci, or 0")


class _Rehearsal:
    """All stages, and the data that flows between them."""

    def __init__(
        self, spec: PipelineSpec, schedule: Schedule, flushed: int, stages: list[Stage], norms: Norms, clip: float
    ) -> None:
        self._spec, self._schedule, self._flushed = spec, schedule, flushed
        self._stages, self._norms, self._clip = stages, norms, clip

    def run(self, batches: Iterable[Sequence[tuple[Any, Any]]]) -> Iterator[Update]:
        calls = [self._calls(stage.number, _ENDLESS) for stage in self._stages]
        count = 0
        try:
            for batch in batches:
                self._admit(batch, count)
                count += 1
                for update in self._execute([next(ops) for ops in calls]):
                    for stage in self._stages:
                        stage.show_real()
                    yield update
                    for stage in self._stages:
                        stage.go_on()
            for drain in zip(*(self._after(count, stage.number) for stage in self._stages), strict=True):
                self._execute(drain)
        finally:
            for stage in self._stages:
                stage.close()

    def _calls(self, stage: int, count: int) -> Iterator[Iterable[Op]]:
        """The calls of a stage that take `count` batches, and those that drain the pipe; the first ones may flush."""
        yield from OneFOneB().calls(self._spec, stage, min(self._flushed, count))
        for call in self._schedule.calls(self._spec, stage, max(0, count - self._flushed)):
            yield map(self._after_warmup, call)

    def _after_warmup(self, op: Op) -> Op:
        """The op, with micro-batches and updates counted from the start of training."""
        before = self._flushed if op.kind is OpKind.STEP else self._flushed * self._spec.accumulation
        return op._replace(index=op.index + before)

    def _after(self, count: int, stage: int) -> Iterator[Iterable[Op]]:
        """The calls that are left for a stage when `count` batches have been taken."""
        calls = () if self._schedule.flushes else self._calls(stage, count)
        return itertools.islice(calls, count, None)

    def _admit(self, batch: Sequence[tuple[Any, Any]], number: int) -> None:
        pairs = list(batch)
        if len(pairs) != self._spec.accumulation:
            raise ConfigError(
                f"batch {number} has {len(pairs)} micro-batches: each must have "
                f"accumulation={self._spec.accumulation}; leave out the last, short batch, or change accumulation"
            )
        for index, pair in enumerate(pairs, number * self._spec.accumulation):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ConfigError(
                    f"micro-batch {index} is a {type(pair).__name__}: each must be a pair (inputs, labels)"
                )
            self._stages[0].activations[index], self._stages[-1].labels[index] = pair

    def _execute(self, ops_of_stages: Sequence[Iterable[Op]]) -> list[Update]:
        """Run the ops of one call; returns the updates that the last stage made in it."""
        queues, updates = [deque(ops) for ops in ops_of_stages], []
        while any(queues):
            progress = False
            for stage, queue in zip(self._stages, queues, strict=True):
                while queue and self._is_ready(stage, queue[0]):
                    op, progress = queue.popleft(), True
                    losses = self._do(stage, op)
                    stage.meter.record(op)
                    if losses is not None:
                        updates.append((op.index, losses))
            assert progress, f"no stage can go on: {[str(queue[0]) for queue in queues if queue]}"
        drift = [stage.meter.largest for stage in self._stages]
        return [Update(index, list(drift), losses) for index, losses in updates]

    def _is_ready(self, stage: Stage, op: Op) -> bool:
        if op.kind is OpKind.FORWARD:
            return op.index in stage.activations
        if op.kind is OpKind.BACKWARD:
            return stage is self._stages[-1] or op.index in stage.gradients
        if self._clip and not self._norms.has(stage.number, op.index):
            self._norms.put(stage.number, op.index, stage.square())
        return not self._clip or self._norms.is_complete(op.index)

    def _do(self, stage: Stage, op: Op) -> list[torch.Tensor] | None:
        """Execute an op; returns the losses of the micro-batches in an update of the last stage, None for other ops."""
        is_last = stage is self._stages[-1]
        if op.kind is OpKind.FORWARD:
            output = stage.forward(op.index)
            if not is_last:
                self._stages[stage.number + 1].activations[op.index] = output
        elif op.kind is OpKind.BACKWARD:
            gradients = stage.backward(op.index)
            if stage.number:
                self._stages[stage.number - 1].gradients[op.index] = gradients
        else:
            losses = list(stage.losses) if is_last else None
            square = self._norms.total(stage.number, op.index, stage.last_forward) if self._clip else None
            stage.step(self._clip, square)
            return losses
        return None

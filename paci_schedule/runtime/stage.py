"""One stage at work: executes the programs that the core generates, and keeps the books.

The runner decides no order.  A framework adapter supplies what only it can do (`StageCompute`), the links carry the
messages, and the drift meter counts what happened.

The loss of a micro-batch is known at the last stage only; it travels upstream with that micro-batch's gradient, so
every stage learns the loss of what it finished without a collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch

from paci_schedule.core.drift import DriftMeter
from paci_schedule.core.lower import Lowering
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.base import Call, Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError, LinkError
from paci_schedule.predict import Prediction
from paci_schedule.runtime.bulletin import Bulletin
from paci_schedule.runtime.deferred.state import DeferredState
from paci_schedule.runtime.finite import FiniteGuard
from paci_schedule.runtime.links import Links
from paci_schedule.runtime.message import Payload, Riders
from paci_schedule.runtime.ranges import Ranges
from paci_schedule.runtime.stopwatch import DATA, Stopwatch

__all__ = ["SplitCompute", "StageCompute", "StageRunner"]


class StageCompute(Protocol):
    """What a framework does for a stage."""

    def forward(self, micro_batch: int, inputs: Payload | None) -> Payload | None:
        """Forward of one micro-batch.

        Args:
            micro_batch: its index.
            inputs: what the stage before sent, None at the first stage.

        Returns:
            What the next stage gets, None at the last stage.
        """
        ...

    def backward(self, micro_batch: int, gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Backward of one micro-batch, with the weights as they are now.

        Args:
            micro_batch: its index.
            gradients: of the floating-point tensors that `forward` returned, in order; empty at the last stage.

        Returns:
            Gradients of the floating-point tensors in `inputs`, in order; empty at the first stage.
        """
        ...

    def losses(self, micro_batch: int) -> torch.Tensor:
        """Asked at the last stage, after `backward`: float32[n], the loss and whatever else is averaged like it."""
        ...

    def step(self, update: int, losses: torch.Tensor) -> None:
        """The local optimizer update, with the mean `losses` (float32[n]) over its a micro-batches."""

    def post_sum(self, tie: int) -> None:
        """Start the sum, over its copies, of the oldest gradient of tied weight number `tie` that waits for it."""


class SplitCompute(StageCompute, Protocol):
    """What a framework does for a stage under a schedule that splits the backward."""

    def backward_input(self, micro_batch: int, gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """As `backward`, but only as far as the gradients of `inputs` take; `backward_weight` does the rest."""
        ...

    def backward_weight(self, micro_batch: int) -> None:
        """The gradients of the weights of a micro-batch whose `backward_input` is done."""


class StageRunner:
    """Runs one stage, call by call, and decides nothing: it executes the programs of its schedule.

    Args:
        spec: the pipeline.
        stage: this rank's stage.
        compute: the framework's part; a `SplitCompute` under a schedule that splits the backward.
        links: the stage's links.
        stopwatch: where the time is booked; the caller of `train_batch` starts it.
        deferred: the stage's deferred state, whose norms and reports travel with the messages, and whose guard
            hears the losses; None for none.
        ties: for each tied weight of this stage, the stages that hold a copy (`core.lower`).
        early_receives: post the receives of gradients before F (`core.lower`).
        prediction: of this stage's weights, for stale forwards; None for none.
        finite: looks at what the stage computes, and is asked where the pipe is empty; None where nobody looks.
        schedule: what to run.
        bulletin: what hears of every update; None for nothing.
        ranges: names the ops for profilers.

    Attributes:
        admitted: micro-batches taken in since the pipe was last empty.
        finished: backwards done by every stage since then, at the end of a `lead_batch`.
        forwards, backwards: ops done since construction.
        peak_in_flight: the most micro-batches that were live at once.
        meter: drift and version counted so far.
        window_drift: the largest drift of the update's micro-batches so far.
        untold: the losses of the finished micro-batches that `take_losses` has not told yet.
        interrupted: an error left micro-batches in flight that nothing can finish.
        at: the op that runs, or ran last.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        stage: int,
        compute: StageCompute,
        links: Links,
        stopwatch: Stopwatch,
        deferred: DeferredState | None = None,
        ties: Sequence[Sequence[int]] = (),
        early_receives: bool = False,
        prediction: Prediction | None = None,
        finite: FiniteGuard | None = None,
        *,
        schedule: Schedule,
        ranges: Ranges,
        bulletin: Bulletin | None = None,
    ) -> None:
        self.spec = spec
        self.stage = stage
        self.admitted = self.finished = 0
        self.interrupted = False
        self.at: Op | None = None
        self.forwards = self.backwards = self.peak_in_flight = self.window_drift = 0
        self.meter = DriftMeter()
        self._seconds_told = 0.0, 0.0
        self._compute, self._links, self._stopwatch = compute, links, stopwatch
        self._deferred, self._norms = deferred, None if deferred is None else deferred.norms
        self._reports = None if deferred is None else deferred.reports
        self._spikes = None if deferred is None else deferred.spikes
        self._ties, self._early_receives, self._prediction = ties, early_receives, prediction
        self._finite = finite
        self._ranges, self._bulletin = ranges, bulletin
        self._received: dict[int, tuple[Payload, Riders]] = {}
        self._outputs: dict[int, tuple[Payload, Riders]] = {}
        self._gradients: dict[int, tuple[tuple[torch.Tensor, ...], Riders]] = {}
        self.untold: list[torch.Tensor] = []
        self._window: list[torch.Tensor] = []
        self._schedules: list[Schedule] = []
        self._split = cast(SplitCompute, compute)  # asked only where the schedule splits the backward
        self._held = 0  # micro-batches whose activations are held
        self._execute = {
            OpKind.FORWARD: self._forward,
            OpKind.BACKWARD: self._backward,
            OpKind.WEIGHT: self._backward_weight,
            OpKind.STEP: self._step,
            OpKind.EXPECT_ACTIVATION: links.expect_activation,
            OpKind.RECV_ACTIVATION: self._recv_activation,
            OpKind.SEND_ACTIVATION: self._send_activation,
            OpKind.EXPECT_GRADIENT: links.expect_gradient,
            OpKind.RECV_GRADIENT: self._recv_gradient,
            OpKind.SEND_GRADIENT: self._send_gradient,
            OpKind.SUM: self._post_sum,
        }

        self.schedule = schedule

    @property
    def schedule(self) -> Schedule:
        """What the stage runs; it may be changed while the pipe is empty."""
        return self._schedules[-1]

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        assert self.admitted == 0, "drain before changing the schedule"
        self._schedules = [*(each for each in self._schedules if each.name != schedule.name), schedule]
        self._links.limit_gradients(schedule.gradients_on_wire(self.spec, self.stage))
        self._lowering = Lowering(schedule, self.spec, self.stage, ties=self._ties, early_receives=self._early_receives)

    @property
    def flushing(self) -> bool:
        """Whether every batch begins and ends with an empty pipe."""
        return self.schedule.flushes

    @property
    def drift_bound(self) -> int:
        """The most drift that this stage can see, under any of the schedules that it has had."""
        return max(schedule.drift_bound(self.spec, self.stage) for schedule in self._schedules)

    def train_batch(self) -> torch.Tensor | None:
        """Admit a micro-batches.  Returns the losses as `take_losses` does."""
        self.admit_batch()
        return self.take_losses()

    def admit_batch(self) -> None:
        """Admit a micro-batches.  The losses of what is finished are those that are taken next."""
        self._note_batch(self.flushing)
        self._call(self.schedule.call(self.spec, self.admitted))

    def lead_batch(self, last: int | None = None) -> torch.Tensor:
        """Finish a micro-batches, forwards leading, and return their mean losses.

        Args:
            last: micro-batches, counted since the pipe was last empty, after which it shall be empty again.

        Raises:
            ConfigError: the pipe has taken in more than `last` already.
        """
        if last is not None and last < self.admitted:
            raise ConfigError(
                f"the pipe cannot be empty after {last} micro-batches: {self.admitted} were taken in already; plan the "
                f"end {self.spec.look_ahead(0)} micro-batches ahead"
            )
        self._note_batch(self.flushing)
        self._call(self.schedule.call(self.spec, self.admitted, self.finished, last))
        losses = self.take_losses()
        assert losses is not None, "a leading call finishes a whole batch"
        if not self.admitted:
            self._finish()
        return losses

    def count_flushed(self, schedule: Schedule) -> None:
        """Count a batch that the framework itself has run under `schedule`, from an empty pipe to an empty one."""
        self._note_batch(flushed=True)
        for op in schedule.call(self.spec).ops(self.stage):
            self.meter.record(op)
            self.forwards += op.kind is OpKind.FORWARD
            self.backwards += op.kind is OpKind.BACKWARD
            self.peak_in_flight = max(self.peak_in_flight, self.meter.in_flight)

    def drain(self) -> None:
        """Finish the outstanding backwards.  Afterwards the pipe is empty and every stage has the same version.

        The losses of what it finishes belong to those that are taken next.
        """
        self._stopwatch.start()
        self._call(self.schedule.drain(self.spec, self.admitted))
        self._finish()
        if self._deferred is not None:
            self._deferred.exchange()

    def take_losses(self) -> torch.Tensor | None:
        """The mean losses over the micro-batches finished since they were taken last; None if there were none."""
        untold, self.untold = self.untold, []
        return torch.stack(untold).mean(0) if untold else None

    def respec(self, spec: PipelineSpec) -> None:
        """Go on with another spec, from an empty pipe."""
        self.spec = spec
        self.schedule = self.schedule
        if self._deferred is not None:
            self._deferred.respec(spec)

    def stats(self) -> dict[str, Any]:
        """What this stage has done since construction, but for the seconds: those are since the last call to this.

        Returns:
            stage, stages, accumulation: where it stands in which pipeline;
            version: updates applied; forwards, backwards: micro-batches done;
            in_flight, peak_in_flight: micro-batches between their forward and backward, now and at most;
            max_drift, drift_bound, drift_histogram: in updates; micro-batches for each drift;
            predictions: of weights, for stale forwards;
            compute_seconds, wait_seconds: as `seconds`, since the last call to this.
        """
        since, self._seconds_told = self._seconds_told, self.seconds()
        return {
            "stage": self.stage,
            "stages": self.spec.stages,
            "accumulation": self.spec.accumulation,
            "version": self.meter.version,
            "forwards": self.forwards,
            "backwards": self.backwards,
            "in_flight": self.meter.in_flight,
            "peak_in_flight": self.peak_in_flight,
            "max_drift": self.meter.largest,
            "drift_bound": self.drift_bound,
            "drift_histogram": dict(sorted(self.meter.histogram.items())),
            "predictions": 0 if self._prediction is None else self._prediction.made,
            "compute_seconds": self._seconds_told[0] - since[0],
            "wait_seconds": self._seconds_told[1] - since[1],
        }

    def seconds(self) -> tuple[float, float]:
        """Seconds that this stage has computed (F, B, STEP), and waited for its neighbours, since construction."""
        totals = self._stopwatch.totals()
        compute = sum(totals[kind.value] for kind in OpKind if kind.is_compute)
        return compute, sum(totals.values()) - totals[None] - totals[DATA] - compute

    def _call(self, call: Call) -> None:
        """Execute a call."""
        if self.interrupted:
            raise LinkError(
                f"stage {self.stage}: an error interrupted the pipe earlier, so the micro-batches in flight are lost: "
                "start again from the last checkpoint"
            )
        self.interrupted = True
        self._exchange_weights()
        for op in self._lowering.program(call):
            self.at = op
            self._ranges(self._execute[op.kind], op)
            self._stopwatch.lap(op)
        self._exchange_weights()  # not after an error: it may have to wait for replicas
        self.interrupted = False
        is_empty = call.finished == call.taken
        self.admitted, self.finished = (0, 0) if is_empty else (call.taken, call.finished)

    def _note_batch(self, flushed: bool) -> None:
        if self._spikes is not None:
            self._spikes.took_batch(flushed)

    def _finish(self) -> None:
        """The pipe is empty."""
        self._links.finish()
        if self._finite is not None:
            self._finite.settle()
        if self._bulletin is not None:
            self._bulletin.tell()

    def _exchange_weights(self) -> None:
        """Real weights for whoever has control between two calls, and the predictions left in place for the next."""
        if self._prediction is not None:
            self._prediction.exchange()

    def _forward(self, op: Op) -> None:
        inputs, riders = self._received.pop(op.index, (None, ()))
        # Norms count as received when their message is used, as sent when its content is made, whenever the cut between
        # two calls lets it travel.
        if riders and self._norms is not None:
            self._norms.came_down(op.index, riders[0])
        if riders and self._reports is not None:
            self._reports.came_down(riders[-1])
        if self._prediction is None:
            outputs = self._compute.forward(op.index, inputs)
        else:
            # A micro-batch is ahead by the updates that come before its backward.
            scale = self.spec.accumulation / len(self._window) if self._window else 0.0
            self._prediction.before_forward(self.schedule.drift(self.spec, self.stage, op.index), scale)
            outputs = self._compute.forward(op.index, inputs)
            self._prediction.after_forward()
        if outputs is not None:
            carried = [each.going_down() for each in (self._norms, self._reports) if each is not None]
            self._outputs[op.index] = outputs, tuple(carried)
        self.meter.record(op)
        self.forwards += 1
        self._held += 1
        self.peak_in_flight = max(self.peak_in_flight, self._held)

    def _backward(self, op: Op) -> None:
        backward = self._split.backward_input if self.schedule.splits_backward else self._compute.backward
        if self.stage == self.spec.stages - 1:
            gradients = backward(op.index, ())
            losses = self._compute.losses(op.index)
        else:
            incoming, (losses, *_) = self._gradients.pop(op.index)
            gradients = backward(op.index, incoming)
        self.untold.append(losses)
        self._window.append(losses)
        if self.stage > 0:
            self._gradients[op.index] = gradients, (losses, *([] if self._norms is None else [self._norms.going_up()]))
        self.window_drift = max(self.window_drift, self.meter.record(op) or 0)
        self.backwards += 1
        self._held -= not self.schedule.splits_backward

    def _backward_weight(self, op: Op) -> None:
        self._split.backward_weight(op.index)
        self._held -= 1

    def _step(self, op: Op) -> None:
        losses = torch.stack(self._window).mean(0)
        self._window.clear()
        if self._prediction is not None:
            self._prediction.before_step()
        self._compute.step(op.index, losses)
        self.meter.record(op)
        if self._spikes is not None and not self.flushing:
            self._spikes.note(losses)
        if self._bulletin is not None:
            self._bulletin.note(self.meter.version, self.backwards, self.window_drift, self.seconds(), losses)
        self.window_drift = 0

    def _recv_activation(self, op: Op) -> None:
        self._received[op.index] = self._links.recv_activation(op)

    def _send_activation(self, op: Op) -> None:
        self._links.send_activation(op, *self._outputs.pop(op.index))

    def _recv_gradient(self, op: Op) -> None:
        gradients, riders = self._links.recv_gradient(op)
        self._gradients[op.index] = cast("tuple[torch.Tensor, ...]", gradients), riders
        if self._norms is not None:
            self._norms.came_up(op.index, riders[-1])

    def _send_gradient(self, op: Op) -> None:
        self._links.send_gradient(op, *self._gradients.pop(op.index))

    def _post_sum(self, op: Op) -> None:
        self._compute.post_sum(op.chunk)

"""One stage, put together from its parts, alike in every framework."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from paci_schedule import trace
from paci_schedule.core.schedules import registry
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import CheckpointError, DataEndedError, LinkError
from paci_schedule.predict import Prediction
from paci_schedule.runtime.account import Account
from paci_schedule.runtime.bulletin import Bulletin
from paci_schedule.runtime.deferred.norms import CarriedNorms
from paci_schedule.runtime.deferred.reports import CarriedReports
from paci_schedule.runtime.deferred.state import DeferredState
from paci_schedule.runtime.deferred.tied import TiedGradient
from paci_schedule.runtime.finite import FiniteGuard
from paci_schedule.runtime.links import Links
from paci_schedule.runtime.ranges import Ranges
from paci_schedule.runtime.spikes import SpikeGuard
from paci_schedule.runtime.stage import StageCompute, StageRunner
from paci_schedule.runtime.stopwatch import Stopwatch
from paci_schedule.runtime.waiting import impatient, named
from paci_schedule.runtime.watched import WatchedCompute

__all__ = ["Assembly"]

logger = logging.getLogger(__name__)


class Assembly:
    """The norms, the deferred state, the links, the stopwatch and the runner of one stage.

    It is put together in two steps: an optimizer may need the norms before the rest exists.

    Args:
        spec: the pipeline.
        stage: this rank's stage.
        pipeline: the process group of all stages of this rank's pipeline.
        device: where the stage computes.
        carries_norms: gradient norms travel with the messages; else each stage clips by its own norm, or not at all.
        shares_weights: the model ties weights across stages.
        timeout: how long a neighbouring stage may take to answer.
        early_receives: post the receives of gradients one op earlier (`core.lower`).
        varying_shapes: shapes change from micro-batch to micro-batch without being announced (`runtime.links`).
        record: the folder to record runs in; None for none.
        replica: the number of this rank's data-parallel replica.

    Attributes:
        norms: gradient norms that travel with the messages; None for none.
        deferred, links, stopwatch, runner: of the stage, once it is connected.
        bulletin: the figures of all stages, once it is connected.
        spikes: what judges the losses, once it is connected; None for nothing.
    """

    deferred: DeferredState
    links: Links
    stopwatch: Stopwatch
    runner: StageRunner
    bulletin: Bulletin
    spikes: SpikeGuard | None

    def __init__(
        self,
        spec: PipelineSpec,
        stage: int,
        pipeline: dist.ProcessGroup,
        device: torch.device,
        *,
        carries_norms: bool,
        shares_weights: bool,
        timeout: timedelta,
        early_receives: bool,
        record: str | None,
        replica: int = 0,
        varying_shapes: bool = False,
    ) -> None:
        self.norms = None
        if carries_norms:
            self.norms = CarriedNorms(spec, stage, pipeline, device, agrees=shares_weights, timeout=timeout)
        self._spec, self._stage, self._device, self._timeout = spec, stage, device, timeout
        self._early_receives, self._varying_shapes = early_receives, varying_shapes
        self._record, self._replica = record, replica
        self._account: Account | None = None
        self._accounted: Exception | None = None  # the error of which the account was written

    def connect(
        self,
        compute: StageCompute,
        schedule: Schedule,
        pipelines: list[list[int]],
        tied: Mapping[str, TiedGradient],
        ties: Sequence[Sequence[int]],
        prediction: Prediction | None,
        reports: CarriedReports | None = None,
        loss: Callable[[Sequence[float]], float] = lambda losses: losses[0],
        watched: torch.nn.Module | None = None,
        spike: tuple[float, int] | None = None,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        """Connect the stage with its neighbours.

        Every rank of the job calls this at the same time, since neighbours set up a link together.

        Args:
            compute: the framework's part.
            schedule: what to run.
            pipelines: for every pipeline of the job its ranks in stage order, the same list on every rank.
            tied: the gradients of this stage's copies of tied weights, by the names that they are saved under.
            ties: for each tied weight that the runner sums, the stages that hold a copy.
            prediction: of the stage's weights; None for none.
            reports: sums for the log that travel with the activations; None for none.
            loss: as of `Bulletin`.
            watched: the stage's module, where an error is wanted if what it computes is not finite; else None.
            spike: the rise of a loss spike, and the updates under a flush after one; None where nobody guards.
            replicas: the process group of this stage's replicas, for the guard.
        """
        early_receives, records = self._early_receives, self._record is not None
        self._ranks = sorted(pipeline[self._stage] for pipeline in pipelines)
        self._pipeline = next(pipeline for pipeline in pipelines if dist.get_rank() in pipeline)
        self.spikes = None
        if spike is not None and replicas is not None:
            self.spikes = SpikeGuard(*spike, self._spec, self._stage, replicas, self._timeout, loss)
        self.deferred = DeferredState(
            self._stage, self._device, self._timeout, self.norms, tied, prediction, reports, self.spikes
        )
        self.links = Links(
            pipelines,
            self._device,
            self._timeout,
            early_receives=early_receives,
            varying_shapes=self._varying_shapes,
            lost=self._lost,
        )
        self.stopwatch = Stopwatch(self._device, records=records)
        self._watched, self._finite = watched, None if watched is None else FiniteGuard(self._stage)
        self.bulletin = Bulletin(
            self._stage,
            self._spec.stages,
            tells=dist.get_rank() in pipelines[0],
            folder=self._record,
            loss=loss,
            record=self.write_recording if records else None,
        )
        self.runner = StageRunner(
            self._spec,
            self._stage,
            compute if self._finite is None else WatchedCompute(compute, self._finite),
            self.links,
            self.stopwatch,
            self.deferred,
            ties,
            early_receives,
            prediction,
            self._finite,
            schedule=schedule,
            ranges=Ranges(self._device),
            bulletin=self.bulletin,
        )
        if self._record is not None:
            self._account = Account(self._record, self._replica, self.runner, self.links, self.stopwatch)

    def close_update(self) -> None:
        """The stage's update is done.

        Raises:
            NonfiniteError: something that this stage computed is not finite, and an error is wanted then.
        """
        self.deferred.close_update()
        if self._finite is not None and self._watched is not None:
            self._finite.look("a weight after the newest update", self._watched.parameters())

    def begin_batch(self, usual: Schedule, warms_up: bool, empty: Callable[[], object]) -> None:
        """Choose the schedule of the batch to come, which can change where the pipe is empty.

        What the stages learn late under a schedule without a flush, they begin it with.

        Args:
            usual: what the job runs, except for 1F1B while it warms up and for a while after a loss spike.
            warms_up: whether the update that comes is one of the warm-up.
            empty: empties the pipe, on every stage.
        """
        spiked = self.spikes is not None and self.spikes.wants_flush()
        if spiked and not self.runner.flushing:
            empty()
        if self.runner.admitted:
            return
        chosen = (
            registry.schedule("1f1b") if spiked or warms_up else usual
        )  # alike on every stage: all stand at the same update
        if self.runner.flushing and not chosen.flushes:
            self.deferred.exchange()
        if chosen.name != self.runner.schedule.name:
            self.runner.schedule = chosen

    @contextmanager
    def accounted(self, flushed: bool = False) -> Iterator[None]:
        """What runs inside waits for no rank longer than the timeout.

        If an error ends it, and runs are recorded, all ranks write where they stand.

        Args:
            flushed: whether a schedule of the framework's own flushes, so that the runner does not know of it.

        Raises:
            LinkError: another rank of this stage, or under a flush of this pipeline, is gone or did not answer, in
                place of the transport's error.
        """
        try:
            with impatient(self._timeout):
                yield
        except (DataEndedError, CheckpointError):  # which end nothing, and which every rank raises
            raise
        except Exception as raised:
            error = self._named(raised, flushed or self.runner.flushing)
            if self._account is not None and error is not self._accounted:
                self._accounted = error
                self.write_recording()
                self._account.ended(error)
            if error is raised:
                raise
            raise error from raised

    def _named(self, error: Exception, flushed: bool) -> Exception:
        at = self.runner.at
        doing = "worked together with" if flushed or at is None else f"worked (at {at} or after it) together with"
        peers, ranks = "the other ranks of this stage", self._ranks
        if flushed:
            peers, ranks = f"the other stages and {peers}", sorted({*ranks, *self._pipeline})
        return named(error, self._stage, doing, peers, ranks, self._timeout)

    def _lost(self, error: LinkError) -> None:
        if self._account is not None:
            self._account.lost(error)

    def write_recording(self, newest: int | None = None) -> None:
        """Write the newest ops of this rank, where runs are recorded; a full disk stops no training.

        Args:
            newest: how many ops; None for all that are kept.
        """
        if self._record is not None:
            runner, spans = self.runner, [*self.stopwatch.spans()]
            try:
                kept = spans[-newest:] if newest else spans
                trace.write(self._record, runner.spec, runner.stage, self._replica, kept)
            except OSError as error:
                logger.warning("stage %d: this run is not recorded: %s", runner.stage, error)

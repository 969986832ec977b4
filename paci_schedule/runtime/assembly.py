"""One stage, put together from its parts, alike in every framework."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from paci_schedule import trace
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import DataEndedError, LinkError
from paci_schedule.predict import Prediction
from paci_schedule.runtime.bulletin import Bulletin
from paci_schedule.runtime.deferred.norms import CarriedNorms
from paci_schedule.runtime.deferred.reports import CarriedReports
from paci_schedule.runtime.deferred.state import DeferredState
from paci_schedule.runtime.deferred.tied import TiedGradient
from paci_schedule.runtime.links import Links
from paci_schedule.runtime.ranges import Ranges
from paci_schedule.runtime.stage import StageCompute, StageRunner
from paci_schedule.runtime.stopwatch import Stopwatch

__all__ = ["Assembly"]

logger = logging.getLogger(__name__)

_NEWEST = 60  # ops in a position


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

    Attributes:
        norms: gradient norms that travel with the messages; None for none.
        deferred, links, stopwatch, runner: of the stage, once it is connected.
        bulletin: the figures of all stages, once it is connected.
    """

    deferred: DeferredState
    links: Links
    stopwatch: Stopwatch
    runner: StageRunner
    bulletin: Bulletin

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
        varying_shapes: bool = False,
    ) -> None:
        self.norms = None
        if carries_norms:
            self.norms = CarriedNorms(spec, stage, pipeline, device, agrees=shares_weights, timeout=timeout)
        self._spec, self._stage, self._device, self._timeout = spec, stage, device, timeout
        self._accounted: Exception | None = None  # the error whose position is written
        self._early_receives, self._record, self._varying_shapes = early_receives, record, varying_shapes

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
        """
        early_receives, records = self._early_receives, self._record is not None
        self.deferred = DeferredState(self._device, self.norms, tied, prediction, reports)
        self.links = Links(
            pipelines,
            self._device,
            self._timeout,
            early_receives=early_receives,
            varying_shapes=self._varying_shapes,
            record=self._record,
        )
        self.stopwatch = Stopwatch(self._device, records=records)
        self.bulletin = Bulletin(
            self._stage,
            self._spec.stages,
            tells=dist.get_rank() in pipelines[0],
            folder=self._record,
            loss=loss,
            record=partial(self.write_recording, 0) if records else None,
        )
        self.runner = StageRunner(
            self._spec,
            self._stage,
            compute,
            self.links,
            self.stopwatch,
            self.deferred,
            ties,
            early_receives,
            prediction,
            schedule=schedule,
            ranges=Ranges(self._device),
            bulletin=self.bulletin,
        )

    def choose_schedule(self, chosen: Schedule) -> None:
        """Run another schedule from here on; asked while the pipe is empty, when every stage has the same version.

        What the stages learn late under a schedule without a flush, they begin it with.
        """
        if self.runner.flushing and not chosen.flushes:
            self.deferred.exchange()
        if chosen.name != self.runner.schedule.name:
            self.runner.schedule = chosen

    @contextmanager
    def accounted(self, replica: int) -> Iterator[None]:
        """If an error ends what runs inside, and runs are recorded, this rank writes where it stood, and its recording.

        Args:
            replica: as of `write_recording`.
        """
        try:
            yield
        except DataEndedError:  # which is no crash
            raise
        except Exception as error:
            if self._record is not None and error is not self._accounted:
                self._accounted = error
                self.write_recording(replica)
                self._write_position(self._record, replica, error)
            raise

    def _write_position(self, folder: str, replica: int, error: Exception) -> None:
        runner, mono, wall = self.runner, time.perf_counter(), time.time()
        spans = [*self.stopwatch.spans()][-_NEWEST:]
        position = trace.Position(
            rank=dist.get_rank(),
            ranks=dist.get_world_size(),
            stage=runner.stage,
            stages=runner.spec.stages,
            replica=replica,
            at=wall,
            op="" if runner.at is None else str(runner.at),
            version=runner.meter.version,
            forwards=runner.forwards,
            backwards=runner.backwards,
            in_flight=runner.meter.in_flight,
            waits_for=error.ranks if isinstance(error, LinkError) else (),
            error=f"{type(error).__name__}: {error}".partition("\n")[0][:2000],
            posted=self.links.under_way(),
            newest=[(str(what), start - mono, end - mono) for what, start, end in spans],
            stack="".join(traceback.format_exception(error))[-20_000:],
        )
        try:
            trace.write_position(folder, position)
        except OSError as failed:
            logger.warning("stage %d: cannot write where it stood: %s", runner.stage, failed)

    def write_recording(self, replica: int, newest: int | None = None) -> None:
        """Write the newest ops of this rank, where runs are recorded; a full disk stops no training.

        Args:
            replica: the number of this rank's data-parallel replica.
            newest: how many ops; None for all that are kept.
        """
        if self._record is not None:
            runner, spans = self.runner, [*self.stopwatch.spans()]
            try:
                trace.write(self._record, runner.spec, runner.stage, replica, spans[-newest:] if newest else spans)
            except OSError as error:
                logger.warning("stage %d: this run is not recorded: %s", runner.stage, error)

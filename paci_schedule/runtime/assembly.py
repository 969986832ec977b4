"""One stage, put together from its parts, alike in every framework."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch

from paci_schedule import trace
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.predict import Prediction
from paci_schedule.runtime.deferred.state import DeferredState
from paci_schedule.runtime.links import Links
from paci_schedule.runtime.stage import StageCompute, StageRunner
from paci_schedule.runtime.stopwatch import Stopwatch

__all__ = ["Assembly"]


class Assembly:
    """The links, the stopwatch and the runner of one stage.

    Every rank of the job constructs its own at the same time, since neighbours set up a link together.

    Args:
        compute: the framework's part.
        spec: the pipeline.
        stage: this rank's stage.
        pipelines: for every pipeline of the job its ranks in stage order, the same list on every rank.
        device: where the stage computes.
        deferred: the stage's deferred state.
        prediction: of the stage's weights; None for none.
        ties: for each tied weight of this stage, the stages that hold a copy.
        schedule: what the stage runs at first.
        timeout: how long a neighbouring stage may take to answer.
        early_receives: post the receives of gradients one op earlier (`core.lower`).
        record: the folder to record runs in; None for none.
    """

    def __init__(
        self,
        compute: StageCompute,
        spec: PipelineSpec,
        stage: int,
        pipelines: Sequence[Sequence[int]],
        device: torch.device,
        deferred: DeferredState,
        prediction: Prediction | None,
        ties: Sequence[Sequence[int]],
        *,
        schedule: Schedule,
        timeout: timedelta,
        early_receives: bool,
        record: str | None,
    ) -> None:
        self.links = Links(spec, pipelines, device, timeout, early_receives=early_receives, record=record)
        self.stopwatch = Stopwatch(device, records=record is not None)
        self.runner = StageRunner(
            spec,
            stage,
            compute,
            self.links,
            self.stopwatch,
            deferred,
            ties,
            early_receives,
            prediction,
            schedule=schedule,
        )
        self._record = record

    def write_recording(self, replica: int) -> None:
        """Write the newest ops of this rank, where runs are recorded.

        Args:
            replica: the number of this rank's data-parallel replica.
        """
        if self._record is not None:
            runner = self.runner
            trace.write(self._record, runner.spec, runner.stage, replica, self.stopwatch.spans())

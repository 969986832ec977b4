"""The deferred state of a stage, with one owner: its parts change, are saved and are loaded together."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.predict import Prediction
from paci_schedule.runtime.deferred.norms import CarriedNorms
from paci_schedule.runtime.deferred.reports import CarriedReports
from paci_schedule.runtime.deferred.tied import TiedGradient
from paci_schedule.runtime.spikes import NOTHING_JUDGED, SpikeGuard
from paci_schedule.runtime.waiting import waiting

__all__ = ["DeferredState"]


class DeferredState:
    """What a stage learns later than under a flush: other stages' gradient norms, and sums of tied weights' gradients.

    The clip factor of the stage's newest update, with which the next predictions are made, is kept with them, and so
    are the losses that the next ones are compared with.

    Args:
        stage: this rank's.
        device: where the stage computes.
        timeout: how long the other stages may take where the pipe is empty.
        norms: gradient norms that travel with the messages; None where each stage clips by its own norm, or not at all.
        tied: the gradients of this stage's copies of tied weights, by the names that they are saved under.
        prediction: of the stage's weights; None for none.
        reports: sums for the log that travel with the activations; None for none.
        spikes: what judges the losses; None for nothing.
    """

    def __init__(
        self,
        stage: int,
        device: torch.device,
        timeout: timedelta,
        norms: CarriedNorms | None,
        tied: Mapping[str, TiedGradient],
        prediction: Prediction | None,
        reports: CarriedReports | None = None,
        spikes: SpikeGuard | None = None,
    ) -> None:
        self.norms, self.tied, self.reports, self.spikes = norms, tied, reports, spikes
        self._stage, self._timeout = stage, timeout
        self._device, self._prediction = device, prediction

    def respec(self, spec: PipelineSpec) -> None:
        """Go on with another spec, from an empty pipe."""
        if self.norms is not None:
            self.norms.respec(spec)
        for gradient in self.tied.values():
            gradient.respec(spec)
        if self.spikes is not None:
            self.spikes.respec(spec)

    def close_update(self) -> None:
        """The stage's update is done."""
        if self.norms is not None:
            self.norms.close_update()

    def exchange(self) -> None:
        """Let every stage learn every norm; a collective of the pipeline, where the pipe is empty."""
        if self.norms is not None:
            self.norms.exchange()

    def state(self) -> dict[str, Any]:
        """The state at an empty pipe, for a checkpoint.

        Returns:
            norms: the squared gradient norms of all stages of the newest updates, oldest first, a row of P each;
            tied: for each tied weight the sums that wait to be applied, oldest first;
            factor: what the newest update was clipped by; None where nothing is predicted or clipped;
            spikes: as of `SpikeGuard.state`; None where nobody judges the losses.

        Raises:
            LinkError: another stage with a tied weight did not answer in time.
        """
        factor = None if self._prediction is None else self._prediction.factor
        return {
            "norms": [] if self.norms is None else self.norms.state(),
            "tied": {name: self._pending(gradient) for name, gradient in self.tied.items()},
            "factor": None if factor is None else factor.item(),
            "spikes": None if self.spikes is None else self.spikes.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> list[str]:
        """Go on as the stage that gave `state`.

        Norms of another number of stages, and sums of weights that are tied between other stages, cannot be used and
        are left out.  Version 0.1.0 saved the sums of a Megatron model's only tied weight as a list.

        Returns:
            the names of the tied weights whose sums were left out.
        """
        saved = state["tied"]
        tied = saved if isinstance(saved, Mapping) else dict(zip(self.tied, [saved], strict=False))
        if self.norms is not None:
            self.norms.load_state([row for row in state["norms"] if len(row) == self.norms.stages])
        if self._prediction is not None:
            factor = state.get("factor")
            self._prediction.factor = None if factor is None else torch.full((), factor, device=self._device)
        if self.spikes is not None:
            self.spikes.load_state(state.get("spikes") or NOTHING_JUDGED)
        for name, gradient in self.tied.items():
            gradient.load_pending([total.to(self._device) for total in tied.get(name, [])])
        return [name for name, sums in tied.items() if sums and name not in self.tied]

    def _pending(self, gradient: TiedGradient) -> list[torch.Tensor]:
        doing = "summed the gradients of a tied weight over"
        with waiting(self._stage, doing, "the stages that hold it", gradient.ranks, self._timeout):
            return gradient.pending()

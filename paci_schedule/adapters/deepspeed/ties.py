"""The weights that stages of a PipelineModule share (TiedLayerSpec), and the deferred sums of their gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import timedelta

import torch

from paci_schedule.adapters.deepspeed.stage_local import StageLocalEngine
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import UnsupportedError
from paci_schedule.runtime.deferred.tied import TiedGradient
from paci_schedule.runtime.waiting import waiting

__all__ = ["Ties"]


class Ties:
    """The tied weights of one stage.

    Args:
        engine: of the stage, with its module.
        spec: the pipeline.
        timeout: how long the other stages that hold a copy may take.

    Attributes:
        gradients: one for each entry of the module's tied weights, in its order, by a name that says which stages hold
            it.
        across: the names of those that several stages share, sorted, for the module's order differs between ranks.
    """

    def __init__(self, engine: StageLocalEngine, spec: PipelineSpec, timeout: timedelta) -> None:
        self._engine, self._timeout = engine, timeout
        self.gradients: dict[str, TiedGradient] = {}
        topology = engine.grid.topology()
        for key, comm in engine.module.tied_comms.items():
            stages = [topology.get_coord(rank).pipe for rank in comm["ranks"]]
            for weight in comm["weight_attr"]:
                name = f"{key}.{weight} of stages {stages} of {spec.stages}"
                self.gradients[name] = TiedGradient(comm["group"], stages, spec, timeout)
        self.across = sorted(name for name, tied in self.gradients.items() if len(tied.ranks) > 1)

    def copies(self) -> list[torch.nn.Parameter]:
        """This stage's copies of the weights in `across`: what updates apply to them is an older sum."""
        weights = self._weights()
        return [weights[name] for name in self.across]

    def exchange(self, at: object, now: bool) -> None:
        """Put in place of this update's gradients the sums that the update is to apply.

        Args:
            at: the op that runs, for the error of a stage that does not answer.
            now: the sums are those of this update, which the stage waits for, and all that are pending.
        """
        for name, weight in self._weights().items():
            if weight.requires_grad:
                gradient, tied = self._gradient(name, weight), self.gradients[name]
                with self._waiting(tied, at):
                    tied.exchange_now(gradient) if now else tied.exchange(gradient)

    def post_sum(self, number: int, at: object) -> None:
        """Start the next sum of `across[number]`, unless that weight is frozen; `at` is as in `exchange`."""
        name = self.across[number]
        if self._weights()[name].requires_grad:
            with self._waiting(self.gradients[name], at):
                self.gradients[name].post()

    def pending_sums(self, at: object) -> list[torch.Tensor]:
        """All sums that wait to be applied, to be changed in place; `at` is as in `exchange`."""
        sums = []
        for tied in self.gradients.values():
            with self._waiting(tied, at):
                sums += tied.pending()
        return sums

    def _weights(self) -> dict[str, torch.nn.Parameter]:
        """This stage's copies, by the names in `gradients`."""
        weights = (weight for weight, _ in self._engine.module.get_tied_weights_and_groups())
        return dict(zip(self.gradients, weights, strict=True))

    def _gradient(self, name: str, weight: torch.nn.Parameter) -> torch.Tensor:
        """The gradient of this stage's copy at this update; zeros if no loss depends on it."""
        gradient = self._engine.gradient_of(weight)
        if gradient is None and self._engine.using_bf16_optimizer:
            raise UnsupportedError(
                f"tied weight {name}: no loss depends on the copy of stage {self._engine.stage_id}, so that "
                "BF16_Optimizer has no gradient for the others' sum; freeze the weight, use it, or train in fp32"
            )
        if gradient is None:
            gradient = weight.grad = torch.zeros_like(weight)
        return gradient

    def _waiting(self, tied: TiedGradient, at: object) -> AbstractContextManager[None]:
        doing = f"summed ({at}) the gradients of a tied weight over"
        return waiting(self._engine.stage_id, doing, "the stages that hold it", tied.ranks, self._timeout)

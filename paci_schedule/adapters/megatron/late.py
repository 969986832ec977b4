"""What a stage learns late by design: other stages' gradient norms, and the sums of the tied embedding's gradients.

And what it goes on with when it is resumed, which is the clip factor of its predictions as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.predict import Prediction
from paci_schedule.runtime.deferred.norms import CarriedNorms
from paci_schedule.runtime.deferred.tied import TiedGradient, delay_between

__all__ = ["Late", "fingerprint", "tied_embedding", "unwrapped"]


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, without the wrappers for data parallelism and mixed precision around it."""
    while hasattr(model, "module"):
        model = model.module
    return model


def tied_embedding(model: torch.nn.Module) -> tuple[bool, torch.nn.Parameter | None]:
    """Whether the model ties its embedding to its head, and this stage's copy, if it holds one."""
    model = unwrapped(model)
    if not getattr(model, "share_embeddings_and_output_weights", False):
        return False, None
    return True, model.shared_embedding_or_output_weight()


def fingerprint(model: torch.nn.Module) -> list[int]:
    """A number for each weight: the sum of its bytes, taken where it lies.  Another version of a model has another."""
    return [int(p.detach().flatten().view(torch.uint8).sum(dtype=torch.int64)) for p in model.parameters()]


class Late:
    """Of one stage.  The training loop updates between two calls, so an update is over when the next call begins.

    Args:
        norms: that travel with the messages; None where each stage clips by its own.
        weight: this stage's copy of the tied embedding, if it holds one.
        group: the ranks that hold a copy.
        spec: the pipeline.
        timeout: how long the other stages may take where the pipe is empty.
        prediction: of this stage's weights; None for none.
        device: of the stage.
    """

    def __init__(
        self,
        norms: CarriedNorms | None,
        weight: torch.nn.Parameter | None,
        group: dist.ProcessGroup | None,
        spec: PipelineSpec,
        timeout: timedelta,
        prediction: Prediction | None,
        device: torch.device,
    ) -> None:
        self.norms = norms
        self._prediction, self._device = prediction, device
        self._weight = weight
        self._tied = None if weight is None else TiedGradient(group, delay_between(spec, 0, spec.stages - 1), timeout)
        self._updating = False

    def respec(self, spec: PipelineSpec) -> None:
        """Go on with another spec, from an empty pipe."""
        if self._tied is not None:
            self._tied.delay = delay_between(spec, 0, spec.stages - 1)

    def begin_update(self) -> None:
        """The call ends; what the loop does now is the update."""
        self._updating = True

    def end_update(self, pipe_is_empty: bool) -> None:
        """The update is done.  After an empty pipe every stage learns every norm: a collective of the pipeline."""
        if self._updating and self.norms is not None:
            self.norms.close_update()
            if pipe_is_empty:
                self.norms.exchange()
        self._updating = False

    @contextmanager
    def exchanging(self, now: bool = False) -> Iterator[None]:
        """Within it, Megatron-core's own sum of the tied embedding's gradients is the deferred one.

        Args:
            now: the sum is applied at once, and with it those that wait.
        """
        module = sys.modules["megatron.core.distributed.finalize_model_grads"]
        stock = module._allreduce_word_embedding_grads
        module._allreduce_word_embedding_grads = partial(self._exchange, now)
        try:
            yield
        finally:
            module._allreduce_word_embedding_grads = stock

    def _exchange(self, now: bool, *_: Any, **__: Any) -> None:
        if self._tied is not None:
            exchange = self._tied.exchange_now if now else self._tied.exchange
            exchange(self._weight.main_grad)

    def post_sum(self) -> None:
        """Start the sum of the embedding's gradients of the update that is over."""
        self._tied.post()

    def state(self) -> dict[str, Any]:
        """Of an empty pipe, for a checkpoint; see `load_state`."""
        factor = None if self._prediction is None else self._prediction.factor
        return {
            "norms": [] if self.norms is None else self.norms.state(),
            "tied": [] if self._tied is None else self._tied.pending(),
            "factor": None if factor is None else factor.item(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on as the stage that gave `state`."""
        if self.norms is not None:
            self.norms.load_state(state["norms"])
        if self._tied is not None:
            self._tied.load_pending([total.to(self._weight.main_grad) for total in state["tied"]])
        if self._prediction is not None:
            factor = state.get("factor")
            self._prediction.factor = None if factor is None else torch.full((), factor, device=self._device)

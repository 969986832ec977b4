"""The embedding that the first and the last stage of a Megatron model share, and the deferred sums of its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from paci_schedule.adapters.megatron.hooks import loaded
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.runtime.deferred.tied import TiedGradient
from paci_schedule.runtime.waiting import waiting

__all__ = ["Ties", "tied_embedding", "unwrapped"]

_EMBEDDING = "embedding"


def unwrapped(model: Any) -> Any:
    """The model itself, without the wrappers for data parallelism and mixed precision around it."""
    while hasattr(model, "module"):
        model = model.module
    return model


def tied_embedding(model: torch.nn.Module) -> tuple[bool, torch.nn.Parameter | None]:
    """Whether the model's last stage has a copy of its embedding, and this stage's copy, if it holds one."""
    whole = unwrapped(model)
    predicts_further = getattr(getattr(whole, "config", None), "mtp_num_layers", None)  # from the embedding, at the end
    if not (getattr(whole, "share_embeddings_and_output_weights", False) or predicts_further):
        return False, None
    return True, whole.shared_embedding_or_output_weight()


class Ties:
    """The tied weights of one stage: its copy of the embedding, or none.

    Args:
        model: the stage's chunk.
        stage: this rank's.
        group: the ranks that hold a copy of the embedding.
        spec: the pipeline.
        timeout: how long the other stages may take where the pipe is empty.

    Attributes:
        stages: for each tied weight of the model, the stages that hold a copy, whether this stage does or not.
        gradients: those of this stage's copies, by name.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        stage: int,
        group: dist.ProcessGroup | None,
        spec: PipelineSpec,
        timeout: timedelta,
    ) -> None:
        self._stage, self._timeout = stage, timeout
        is_tied, weight = tied_embedding(model)
        self._weight: Any = weight  # Megatron's DDP gives it its `main_grad`
        self.stages = [(0, spec.stages - 1)] if is_tied else []
        self.gradients: dict[str, TiedGradient] = {}
        if weight is not None:
            assert group is not None, "a stage with a copy is in their group"
            self.gradients[_EMBEDDING] = TiedGradient(group, self.stages[0], spec, timeout)

    @contextmanager
    def exchanging(self, now: bool = False, scale: Callable[[], None] | None = None) -> Iterator[None]:
        """Within it, Megatron-core's own sum of the embedding's gradients is the deferred one.

        Args:
            now: the sum is that of this update, which the stage waits for, and all that are pending.
            scale: scales all gradients of this update, those to be summed among them.
        """
        module = loaded("megatron.core.distributed.finalize_model_grads")
        stock = module._allreduce_word_embedding_grads
        module._allreduce_word_embedding_grads = partial(self._exchange, now, scale)
        try:
            yield
        finally:
            module._allreduce_word_embedding_grads = stock

    def post_sum(self, number: int) -> None:
        """Start the sum of the embedding's gradients of the update that is over."""
        self.gradients[_EMBEDDING].post()

    def _exchange(self, now: bool, scale: Callable[[], None] | None, *_: Any, **__: Any) -> None:
        if scale is not None:
            scale()
        for tied in self.gradients.values():
            exchange = tied.exchange_now if now else tied.exchange
            doing = "summed the gradients of the embedding over"
            with waiting(self._stage, doing, "the stages that hold it", tied.ranks, self._timeout):
                exchange(self._weight.main_grad)

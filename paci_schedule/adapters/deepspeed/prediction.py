"""Predicted weights in a DeepSpeed job: where its optimizers keep them, and which jobs can have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from paci_schedule.adapters.deepspeed.masters import MasterWeights
from paci_schedule.errors import UnsupportedError
from paci_schedule.predict import Prediction, SteppedWeights, check, clip_factor, interval_of
from paci_schedule.runtime.refusal import refuse_together

if TYPE_CHECKING:
    from paci_schedule.adapters.deepspeed.engine import PaciPipelineEngine

__all__ = ["build_prediction", "note_update"]


def build_prediction(
    engine: PaciPipelineEngine, asked: str | int, gathering: Callable[[], AbstractContextManager[None]]
) -> Prediction | None:
    """What the option "prediction" asks for; None for "off".  A collective of the job, if it asks for one.

    Args:
        engine: with its optimizer.
        asked: the option.
        gathering: within it the stage's replicas wait for each other.

    Raises:
        UnsupportedError: this job cannot have it; on every rank.
    """
    interval = interval_of(asked)
    if interval is None:
        return None
    said = f'"paci": {{"prediction": {asked!r}}} cannot run with this job; change what follows, or use "off"'
    refuse_together(_reasons(engine), said)
    optimizer = engine.optimizer
    has_masters = isinstance(optimizer, BF16_Optimizer)
    return Prediction(MasterWeights(optimizer, gathering) if has_masters else SteppedWeights([optimizer]), interval)


def note_update(engine: PaciPipelineEngine, prediction: Prediction) -> None:
    """Let the next predictions clip as this update did, unless it was skipped."""
    limit = engine.gradient_clipping()
    if limit > 0 and not getattr(engine.optimizer, "overflow", False):
        norm = engine.get_global_grad_norm()
        if isinstance(engine.optimizer, BF16_Optimizer):  # which does divide a Python number
            prediction.factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
        else:
            prediction.factor = clip_factor(limit, norm)


def _reasons(engine: PaciPipelineEngine) -> Iterator[str]:
    optimizer, across = engine.optimizer, engine.ties_across_stages()
    if isinstance(optimizer, BF16_Optimizer):
        optimizer = optimizer.optimizer
    elif optimizer is not engine.basic_optimizer:
        yield (
            f"{type(optimizer).__name__}: its weights and gradients cannot be predicted yet; use fp32 without ZeRO, or "
            '"bf16" with "data_types": {"grad_accum_dtype": "fp32"}'
        )
        return
    try:
        check(optimizer)
    except UnsupportedError as error:
        yield str(error)
    if across:
        yield (
            f"weights tied across stages ({', '.join(across)}): their gradients are applied later than the part that "
            "is there; untie them"
        )
    if any(getattr(part, "sparse", False) is True for part in engine.module.modules()):
        yield "nn.Embedding(sparse=True): the part of its gradient is sparse; use a dense one"

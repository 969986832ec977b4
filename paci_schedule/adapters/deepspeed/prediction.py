"""Predicted weights in a DeepSpeed job: where its optimizers keep them, and which jobs can have them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from paci_schedule.adapters.deepspeed.adam import stepped_as, why_not_ahead
from paci_schedule.adapters.deepspeed.options import PaciOptions
from paci_schedule.adapters.deepspeed.stage_local import StageLocalEngine
from paci_schedule.adapters.deepspeed.working import MasterWeights
from paci_schedule.adapters.refusal import refuse_together
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.core.staleness import interval_of
from paci_schedule.errors import UnsupportedError
from paci_schedule.predict import Prediction, SteppedWeights, check, clip_factor
from paci_schedule.runtime.deferred.tied import drop_overflow

__all__ = ["build_prediction", "check_spec", "copied_bytes", "note_update"]


def build_prediction(
    engine: StageLocalEngine,
    options: PaciOptions,
    spec: PipelineSpec,
    deferred: Collection[torch.nn.Parameter],
    gathering: Callable[[], AbstractContextManager[None]],
) -> Prediction | None:
    """What the option "prediction" asks for; None for "off".  A collective of the job, if it asks for one.

    Args:
        engine: with its optimizer.
        options: of the schedule.
        spec: of the pipeline.
        deferred: the stage's copies of weights that several stages share; their gradients are applied some updates
            later.
        gathering: within it the stage's replicas wait for each other.

    Raises:
        UnsupportedError: this job cannot have it; on every rank.
    """
    interval = interval_of(options.prediction)
    if interval is None:
        return None
    option = f'"paci": {{"prediction": {options.prediction!r}}} cannot run with this job'
    refuse_together(_reasons(engine, options, spec), f'{option}; change what follows, or use "off"')
    optimizer = engine.optimizer
    if optimizer is engine.basic_optimizer:
        # A stage with a tied weight counts what is not finite as zero; any other is lost with it, predicted or not.
        weights = SteppedWeights([stepped_as(optimizer)], deferred, drop_overflow if deferred else None)
    else:
        weights = MasterWeights(optimizer, stepped_as(engine.basic_optimizer), deferred, gathering)
    return Prediction(weights, interval, options.prediction_reach)


def copied_bytes(engine: StageLocalEngine, options: PaciOptions, spec: PipelineSpec) -> int:
    """How many bytes of the stage's weights are kept twice while a prediction stands: all of them, or none."""
    interval = interval_of(options.prediction)
    has_masters = engine.optimizer is not engine.basic_optimizer
    stands_between_calls = interval != 1 and spec.look_ahead(engine.stage_id) > spec.accumulation
    if interval is None or (has_masters and not stands_between_calls):
        return 0
    return sum(weight.numel() * weight.element_size() for weight in engine.module.parameters() if weight.requires_grad)


def check_spec(engine: StageLocalEngine, spec: PipelineSpec) -> None:
    """Raises UnsupportedError where predictions that this job has cannot go on with another spec."""
    reasons = list(why_not_ahead(engine.basic_optimizer, spec))
    if reasons:
        raise UnsupportedError("; ".join(reasons))


def note_update(engine: StageLocalEngine, prediction: Prediction) -> None:
    """Let the next predictions clip as this update did, unless it was skipped."""
    limit, optimizer = engine.gradient_clipping(), engine.optimizer
    if limit > 0 and not getattr(optimizer, "overflow", False):
        norm: Any = engine.get_global_grad_norm()  # a tensor, though DeepSpeed declares a float
        # To the bit as each of them scales.
        if isinstance(optimizer, BF16_Optimizer):
            prediction.factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            prediction.factor = 1.0 / torch.clamp((norm + 1e-6) / limit, min=1.0)
        else:
            prediction.factor = clip_factor(limit, norm)


def _reasons(engine: StageLocalEngine, options: PaciOptions, spec: PipelineSpec) -> Iterator[str]:
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        if optimizer.dtype == torch.float16:
            yield 'ZeRO-1 in "fp16": the loss scale in the part is not undone yet; use "bf16", or fp32'
        if optimizer.low_precision_master_weights_and_grads or optimizer.zenflow:
            yield (
                "ZeRO-1 with masters in low precision, or ZenFlow: their updates round otherwise; leave "
                '"bf16_master_weights_and_grads" and "zenflow" out'
            )
    elif not isinstance(optimizer, BF16_Optimizer) and optimizer is not engine.basic_optimizer:
        yield f'{type(optimizer).__name__}: its weights and gradients cannot be predicted yet; use "bf16", or fp32'
    try:
        check(stepped_as(engine.basic_optimizer), options.prediction_reach)
    except UnsupportedError as error:
        yield str(error)
    yield from why_not_ahead(engine.basic_optimizer, spec)
    if any(getattr(part, "sparse", False) is True for part in engine.module.modules()):
        yield "nn.Embedding(sparse=True): the part of its gradient is sparse; use a dense one"

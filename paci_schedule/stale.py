"""Stale forwards: those that run on weights which the pending update changes before their backward; and predictions.

A forward is stale when its micro-batch belongs to a later window (the micro-batches of one update) than the one whose
gradients its stage is summing.
"""

from __future__ import annotations

from paci_schedule.errors import ConfigError
from paci_schedule.spec import PipelineSpec

__all__ = ["interval_of", "predictions_of_an_update", "stale_forwards"]

ONCE = 0  # the interval of "window"


def interval_of(prediction: object, said: str | None = None) -> int | None:
    """Stale forwards from one prediction to the next: None for "off", 0 for once a window.

    Args:
        prediction: what was asked for.
        said: how it was asked for, for the error.

    Raises:
        ConfigError: it is none of "off", "window", "every" and the whole numbers of at least 1.
    """
    named = {"off": None, "window": ONCE, "every": 1}
    if isinstance(prediction, str) and prediction in named:
        return named[prediction]
    if isinstance(prediction, int) and not isinstance(prediction, bool) and prediction >= 1:
        return prediction
    raise ConfigError(
        f"{said or f'prediction={prediction!r}'}: must be 'off', 'window' (once a window), 'every' (at every stale "
        "forward) or a whole number k of at least 1 (at every k-th)"
    )


def stale_forwards(spec: PipelineSpec, stage: int) -> int:
    """How many of the a forwards from one update to the next are stale, in steady state."""
    return min(spec.look_ahead(stage), spec.accumulation)


def predictions_of_an_update(spec: PipelineSpec, stage: int, prediction: str | int) -> int:
    """How many predictions a stage makes from one update to the next, in steady state."""
    interval, stale = interval_of(prediction), stale_forwards(spec, stage)
    if interval is None:
        return 0
    return min(stale, 1) if interval == ONCE else -(-stale // interval)

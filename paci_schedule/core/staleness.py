"""Stale forwards, which run on weights that the pending update changes before their backward; and predictions for them.

A forward is stale when its micro-batch belongs to a later window (the micro-batches of one update) than the one whose
gradients its stage is summing.
"""

from __future__ import annotations

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError

__all__ = ["check_reach", "interval_of", "predictions_of_an_update", "stale_forwards"]

ONCE = 0  # the interval of "window"
FARTHEST = 4


def interval_of(prediction: object, written: str | None = None) -> int | None:
    """How many stale forwards share a prediction: None for "off", 0 for one prediction a window.

    Args:
        prediction: what the user asked for.
        written: how the user wrote it, for the error.

    Raises:
        ConfigError: the value is none of "off", "window", "every" and the whole numbers of at least 1.
    """
    named = {"off": None, "window": ONCE, "every": 1}
    if isinstance(prediction, str) and prediction in named:
        return named[prediction]
    if isinstance(prediction, int) and not isinstance(prediction, bool) and prediction >= 1:
        return prediction
    raise ConfigError(
        f"{written or f'prediction={prediction!r}'}: must be 'off', 'window' (once a window), 'every' (at every stale "
        "forward) or a whole number k of at least 1 (at every k-th)"
    )


def check_reach(reach: object, prediction: str | int, written: str | None = None) -> None:
    """Raises ConfigError where predictions cannot reach so far.

    Args:
        reach: how far along the expected updates predicted weights lie; 1 is where these end.
        prediction: as `interval_of` takes it.
        written: how the user wrote the reach, for the error.
    """
    written = written or f"prediction_reach={reach!r}"
    if isinstance(reach, bool) or not isinstance(reach, int | float) or not 0 < reach <= FARTHEST:
        raise ConfigError(f"{written}: must be a number above 0 and at most {FARTHEST}, where 1 is the next weights")
    interval = interval_of(prediction)
    if reach != 1 and interval is None:
        raise ConfigError(f"{written}: has no effect without a prediction; take prediction='every', or leave it out")
    if reach != 1 and interval != 1:
        raise ConfigError(
            f"{written} with prediction={prediction!r}: backwards, too, would run on weights that no update leaves; "
            "take prediction='every', where only forwards do, or a reach of 1"
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

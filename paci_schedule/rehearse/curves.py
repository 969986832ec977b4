"""The picture of a comparison: the training loss against tokens, and against ideal time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from paci_schedule.errors import ConfigError
from paci_schedule.rehearse.comparison import Comparison, ideal_time
from paci_schedule.rehearse.trial import Settings, Trial

__all__ = ["draw"]

_POINTS = 40


def draw(found: Sequence[Comparison], settings: Settings, path: Path) -> None:
    """Write the picture; the ending of the name decides its format.

    Raises:
        ConfigError: the format is unknown, or the file cannot be written.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    tokens, time = figure.subplots(1, 2, sharey=True)
    batch = settings.accumulation * settings.micro_batch * settings.context
    for each in found:
        variant = each.equal_tokens.variant
        label = variant.schedule + ("" if variant.prediction == "off" else f", prediction {variant.when}")
        tokens.plot(*_line(each.equal_tokens, lambda batches: batches * batch * 1e-6), label=label)
        time.plot(*_line(each.equal_time, partial(ideal_time, variant, settings.spec)), label=label)
    tokens.set(xlabel="tokens (millions)", ylabel="training loss (nats)", title="the same data")
    time.set(xlabel="time (forward and backward of a micro-batch on a stage)", title="the same ideal time")
    for axis in (tokens, time):
        axis.grid(alpha=0.3)
    time.legend()
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ConfigError(f"output={str(path)!r}: cannot be written ({error}); name a .png or .svg file") from None


def _line(trial: Trial, place: Callable[[int], float]) -> tuple[list[float], list[float]]:
    """The mean loss of each piece of the run, at the end of the piece: the place of so many batches."""
    each = -(-len(trial.losses) // _POINTS)
    ends = range(each, len(trial.losses) + 1, each)
    return [place(end) for end in ends], [sum(trial.losses[end - each : end]) / each for end in ends]

"""The options of the schedule, which a config of any framework may hold, and their rules.

This module imports no torch, so that a wrong value in a command line is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeGuard, TypeVar

from paci_schedule.core.staleness import check_reach, interval_of
from paci_schedule.errors import ConfigError, nearest

__all__ = ["LaggingOptions", "Options", "flag_options", "is_calls", "is_count", "option", "parse", "read"]

Check = Callable[[Any, str], object]
"""Raises ConfigError where a value breaks its rule; the second argument is the option as its user wrote it."""

LONGEST = 30 * 24 * 3600  # seconds: what hands a timeout on (timedelta, the transports' milliseconds) knows no infinity

_OptionsT = TypeVar("_OptionsT", bound="Options")


def option(
    default: Any, rule: str | Check, holds: Callable[[Any], bool] = bool, flag: Callable[[str], Any] | None = None
) -> Any:
    """One option: a field of a dataclass.

    Args:
        default: its value where a config does not name it.
        rule: what its value must be, in words; or a check that raises the error itself.
        holds: whether a value keeps the rule that stands in words.
        flag: makes a value of the text behind a flag of a command line, and raises ValueError where it cannot; None for
            an option without a flag.
    """

    def check(value: Any, written: str) -> None:
        if not holds(value):
            raise ConfigError(f"{written}: must be {rule} (default: {default!r})")

    return field(default=default, metadata={"check": check if isinstance(rule, str) else rule, "flag": flag})


def _one_of(*names: str) -> Check:
    def check(value: Any, written: str) -> None:
        if value not in names:
            raise ConfigError(f"{written}: must be one of {nearest(str(value), names)}")

    return check


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 0."""
    return type(value) is int and value >= 0


def is_calls(value: object) -> bool:
    """Whether a value is a whole number of at least 1."""
    return type(value) is int and value >= 1


def _is_timeout(value: object) -> bool:
    return _is_rise(value) and value <= LONGEST


def _is_rise(value: object) -> TypeGuard[float]:
    return (type(value) is int or type(value) is float) and 0 < value < float("inf")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that the schedule has in every framework."""

    timeout: float = option(
        600.0, f"a finite number of seconds greater than 0 and at most {LONGEST} (30 days)", _is_timeout, float
    )
    """Seconds that a neighbouring stage or a replica may take to answer before this rank gives up with a LinkError."""

    clip: Literal["global", "stage"] = option("global", _one_of("global", "stage"), flag=str)
    """Whose norm clipping limits: the whole model's, with other stages' parts deferred, or each stage's own."""

    flush_warmup_steps: int = option(0, "a whole number of updates of at least 0", is_count, int)
    """Updates at the start of training that run 1F1B, for the learning-rate warm-up, where delay hurts most."""

    early_receives: bool = option(False, "true or false", lambda value: type(value) is bool, bool)
    """Post the receives of gradients one op earlier, for stages that differ.  On NCCL a job in which anything waits for
    the whole device then hangs (`paci_schedule.core.lower`)."""

    prediction: str | int = option("off", interval_of, flag=lambda text: int(text) if text.isdecimal() else text)
    """Which stale forwards run on predicted weights: "off", "window", "every" or every k-th (`predict.prediction`)."""

    prediction_reach: float = option(1.0, lambda value, written: check_reach(value, "every", written), flag=float)
    """How far along the expected update these weights lie, with "every"; 1 is the next weights."""

    on_nonfinite: Literal["ignore", "raise", "skip"] = option("ignore", _one_of("ignore", "raise", "skip"), flag=str)
    """What is done where a loss, an activation, a gradient or a weight is infinite or no number: what the framework
    does by itself; a NonfiniteError that names stage and micro-batch; or the stage leaves out the update whose gradient
    is not finite (`runtime.finite`)."""

    loss_spike: float | None = option(None, "a finite number greater than 0", _is_rise, float)
    """How much the loss of an update may be above the median of the updates before it.  Where it is more, the pipe is
    emptied, and updates under 1F1B follow (`runtime.spikes`); None for no such guard."""

    loss_spike_flush_steps: int = option(100, "a whole number of updates of at least 1", is_calls, int)
    """The number of these updates under 1F1B."""

    record: str | None = option(None, "the name of a folder", lambda value: isinstance(value, str) and value != "", str)
    """Folder to record runs in: where the pipe is empty, each rank's newest ops with their times, for `paci trace`."""

    @property
    def spike(self) -> tuple[float, int] | None:
        """What a `SpikeGuard` needs to know; None where nobody guards."""
        return None if self.loss_spike is None else (self.loss_spike, self.loss_spike_flush_steps)


@dataclass(frozen=True, kw_only=True)
class LaggingOptions(Options):
    """Those where backwards may lag behind the calls of the training loop by as much as a user likes."""

    extra_in_flight: int | tuple[int, ...] = option(
        0,
        "a whole number of at least 0, or a list of one for each link",
        lambda value: is_count(value) or (isinstance(value, list | tuple) and all(map(is_count, value))),
    )
    """Rounds of slack that hide slow links: a number for each link, or one for all together (`PipelineSpec`)."""


def read(model: type[_OptionsT], block: object, written: str, write: Callable[[str, str], str]) -> _OptionsT:
    """The options that a config holds.

    Args:
        model: which options there are.
        block: what the config holds.
        written: how a user writes the block, for errors.
        write: how a user writes an option with this name and value, for errors.

    Raises:
        ConfigError: the block is no mapping; an option is unknown, with the nearest valid one; or a value is outside
            its range.
    """
    if not isinstance(block, Mapping):
        raise ConfigError(f"{written}: must be a block of options, such as {write('timeout', '600')}")
    known = {each.name: each for each in fields(model)}
    for name, value in block.items():
        if name not in known:
            raise ConfigError(f"{write(name, '...')}: unknown option; valid are {nearest(str(name), known)}")
        known[name].metadata["check"](value, write(name, repr(value)))
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in block.items()}
    options = model(**values)
    reach = options.prediction_reach
    check_reach(reach, options.prediction, write("prediction_reach", repr(reach)))
    if options.on_nonfinite == "skip" and options.prediction != "off":
        raise ConfigError(
            f"{write('on_nonfinite', repr('skip'))} with prediction={options.prediction!r}: weights would be predicted "
            'from gradients that are not finite, and spoil the updates that follow; take "raise", or no prediction'
        )
    return options


def flag_options(model: type[Options]) -> Mapping[str, Callable[[str], Any]]:
    """The options that flags of a command line can set: name -> what makes a value of a flag's text."""
    return {each.name: each.metadata["flag"] for each in fields(model) if each.metadata["flag"] is not None}


def parse(model: type[Options], name: str, text: str) -> Any:
    """The value of an option, from the text behind its flag.

    Raises:
        ConfigError: it breaks the option's rule.
    """
    try:
        value = flag_options(model)[name](text)
    except ValueError:
        value = text
    next(each for each in fields(model) if each.name == name).metadata["check"](value, repr(text))
    return value

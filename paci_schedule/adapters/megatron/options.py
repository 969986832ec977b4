"""What a model's config may hold for us: ``pipeline_schedule`` and the dictionary ``paci``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from paci_schedule.adapters.choice import check_schedule
from paci_schedule.adapters.patience import LONGEST, is_timeout
from paci_schedule.core.staleness import check_reach, interval_of
from paci_schedule.errors import ConfigError, nearest

__all__ = ["PaciOptions", "read_schedule"]


def _option(default: Any, rule: str, holds: Callable[[Any], bool]) -> Any:
    return field(default=default, metadata={"rule": rule, "holds": holds})


def _calls() -> Any:
    return _option(None, "a whole number of calls greater than 0", lambda value: type(value) is int and value > 0)


@dataclass(frozen=True, kw_only=True)
class PaciOptions:
    """The dictionary ``config.paci``."""

    timeout: float = _option(600.0, f"a number of seconds greater than 0 and at most {LONGEST} (30 days)", is_timeout)
    """Seconds that a neighbouring stage may take to answer before this rank gives up with a LinkError."""

    clip: Literal["global", "stage"] = _option(
        "global", "'global' or 'stage'", lambda value: value in ("global", "stage")
    )
    """Whose norm clip_grad limits: the whole model's, with other stages' parts late, or each stage's own."""

    train_iters: int | None = _calls()
    """Calls after which training ends; the last ones then cool down instead of reading ahead.  Megatron-LM's own
    --train-iters is known without it."""

    drain_interval: int | None = _calls()
    """Calls between two planned ends of the pipe (say, where checkpoints are saved), after which nothing is parked.
    Megatron-LM's own --save-interval and --exit-interval are known without it."""

    flush_warmup_steps: int = _option(
        0, "a whole number of updates, 0 or more", lambda value: type(value) is int and value >= 0
    )
    """Updates at the start of training that run 1F1B, for the learning-rate warm-up, where delay hurts most.  In
    Megatron-LM they are iterations of the job, in a training loop of one's own calls."""

    early_receives: bool = _option(False, "True or False", lambda value: type(value) is bool)
    """Post the receives of gradients one op earlier, for stages that differ.  On NCCL a job in which anything waits for
    the whole device then hangs (`paci_schedule.core.lower`)."""

    prediction: str | int = "off"
    """Which stale forwards run on predicted weights: "off", "window", "every" or every k-th (`predict.prediction`)."""

    prediction_reach: float = 1.0
    """How far along the expected update these weights lie, with "every"; 1 is the next weights."""

    record: str | None = _option(None, "the name of a folder", lambda value: isinstance(value, str) and value != "")
    """Folder to record runs in: at every planned end, each rank's newest ops with their times, for ``paci trace``."""

    @classmethod
    def read(cls, block: Any) -> PaciOptions:
        """The options in such a dictionary.

        Raises:
            ConfigError: an unknown option, with the nearest valid one, or a value outside its range.
        """
        if not isinstance(block, Mapping):
            raise ConfigError(f"config.paci = {block!r}: must be a dictionary of options, like {{'timeout': 60}}")
        known = {option.name: option for option in fields(cls)}
        for name, value in block.items():
            if name not in known:
                raise ConfigError(
                    f"config.paci = {{{name!r}: ...}}: unknown option; valid are {nearest(name, list(known))}"
                )
            if known[name].metadata and not known[name].metadata["holds"](value):
                raise ConfigError(f"config.paci = {{{name!r}: {value!r}}}: must be {known[name].metadata['rule']}")
        interval_of(block.get("prediction", "off"), f"config.paci = {{'prediction': {block.get('prediction')!r}}}")
        options = cls(**block)
        said = f"config.paci = {{'prediction_reach': {options.prediction_reach!r}}}"
        check_reach(options.prediction_reach, options.prediction, said)
        return options


def read_schedule(config: Any, default: str) -> str:
    """The schedule that a model's config asks for; `default` when it says nothing.

    Raises:
        ConfigError: an unknown name, with the nearest valid one.
    """
    name = getattr(config, "pipeline_schedule", None) or default
    return check_schedule(name, f"config.pipeline_schedule = {name!r}")

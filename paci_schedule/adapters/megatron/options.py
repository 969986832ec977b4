"""What a model's config may hold for us: ``pipeline_schedule`` and the dictionary ``paci``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from paci_schedule.choice import check_schedule
from paci_schedule.errors import ConfigError, nearest

__all__ = ["PaciOptions", "read_schedule"]


@dataclass(frozen=True, kw_only=True)
class PaciOptions:
    """The dictionary ``config.paci``."""

    timeout: float = 600.0
    """Seconds that a neighbouring stage may take to answer before this rank gives up with a LinkError."""

    train_iters: int | None = None
    """Calls after which training ends; the last ones then cool down instead of reading ahead.  Megatron-LM's own
    --train-iters is known without it."""

    drain_interval: int | None = None
    """Calls between two planned ends of the pipe (say, where checkpoints are saved), after which nothing is parked.
    Megatron-LM's own --save-interval and --exit-interval are known without it."""

    @classmethod
    def read(cls, block: Any) -> PaciOptions:
        """The options in such a dictionary.

        Raises:
            ConfigError: an unknown option, with the nearest valid one, or a value outside its range.
        """
        if not isinstance(block, Mapping):
            raise ConfigError(f"config.paci = {block!r}: must be a dictionary of options, like {{'timeout': 60}}")
        names = [field.name for field in fields(cls)]
        for name, value in block.items():
            if name not in names:
                raise ConfigError(f"config.paci = {{{name!r}: ...}}: unknown option; valid are {nearest(name, names)}")
            whole = name != "timeout"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value > 0:
                rule = "a whole number of calls" if whole else "a number of seconds"
                raise ConfigError(f"config.paci = {{{name!r}: {value!r}}}: must be {rule} greater than 0")
        return cls(**block)


def read_schedule(config: Any, default: str) -> str:
    """The schedule that a model's config asks for; `default` when it says nothing.

    Raises:
        ConfigError: an unknown name, with the nearest valid one.
    """
    name = getattr(config, "pipeline_schedule", None) or default
    return check_schedule(name, f"config.pipeline_schedule = {name!r}")

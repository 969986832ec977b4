"""What a model's config may hold for us: ``pipeline_schedule`` and the dictionary ``paci``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paci_schedule.adapters.choice import IN_EVERY_LOOP, check_choice
from paci_schedule.adapters.options import Options, is_calls, option, read

__all__ = ["PaciOptions", "read_schedule"]


@dataclass(frozen=True, kw_only=True)
class PaciOptions(Options):
    """The dictionary ``config.paci``.

    The updates of `flush_warmup_steps` are iterations of a Megatron-LM job, or calls in a training loop of one's own.
    """

    train_iters: int | None = option(None, "a whole number of calls greater than 0", is_calls, int)
    """Calls after which training ends; the last ones then cool down instead of reading ahead.  Megatron-LM's own
    --train-iters is known without it."""

    drain_interval: int | None = option(None, "a whole number of calls greater than 0", is_calls, int)
    """Calls between two planned ends of the pipe (say, where checkpoints are saved), after which nothing is parked.
    Megatron-LM's own --save-interval and --exit-interval are known without it."""

    @classmethod
    def read(cls, block: object) -> PaciOptions:
        """The options in such a dictionary.  Raises ConfigError as `options.read` does."""
        return read(cls, block, f"config.paci = {block!r}", lambda name, value: f"config.paci = {{{name!r}: {value}}}")


def read_schedule(config: Any, default: str) -> str:
    """The schedule that a model's config asks for; `default` when it says nothing.

    Raises:
        ConfigError: an unknown name, with the nearest valid one.
    """
    name = getattr(config, "pipeline_schedule", None) or default
    return check_choice(name, f"config.pipeline_schedule = {name!r}", IN_EVERY_LOOP)

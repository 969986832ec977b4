"""What a job is refused for: tables of settings that PACI does not run with, and the refusal on all ranks at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch.distributed as dist

from paci_schedule.errors import UnsupportedError

__all__ = ["Refusal", "launch_blocking", "reasons", "refuse_together"]


def _is_off(value: Any) -> bool:
    return not value


@dataclass(frozen=True)
class Refusal:
    """A setting that PACI does not run with.

    Attributes:
        read: takes the setting's value out of the settings.
        setting: how a user writes it, with ``{value!r}`` where the value stands.
        why: the reason, and what to do instead.
        allowed: whether a value is fine; without it only those that mean "off" are.
    """

    read: Callable[[Any], Any]
    setting: str
    why: str
    allowed: Callable[[Any], bool] = _is_off


def reasons(table: Iterable[Refusal], settings: Any) -> Iterator[str]:
    """Why these settings cannot run under PACI: for each of them the value, the reason and the remedy."""
    for refusal in table:
        value = refusal.read(settings)
        if not refusal.allowed(value):
            yield f"{refusal.setting.replace('{value!r}', repr(value))}: {refusal.why}"


def refuse_together(found: Iterable[str], heading: str) -> None:
    """Raises UnsupportedError on every rank with every reason of any of them, so that none is left waiting.

    It is a collective of the job.

    Args:
        found: why this rank's part of the job cannot run.
        heading: what comes before the list of reasons.
    """
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(found))
    listed = "\n".join(f"  * {reason}" for reason in dict.fromkeys(chain.from_iterable(gathered)))
    if listed:
        raise UnsupportedError(f"{heading}:\n{listed}")


def launch_blocking(option: str) -> Iterator[str]:
    """Why receives cannot be posted early, as `option` asks for, where every launch blocks."""
    value = os.environ.get("CUDA_LAUNCH_BLOCKING", "0")
    if value not in ("", "0"):
        yield (
            f"{option} with CUDA_LAUNCH_BLOCKING={value}: every op would wait for receives posted before it, and "
            "stages for each other in a circle; unset the variable, or leave the option out"
        )

"""What is ours, written into the folder of a distributed checkpoint while a job saves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from paci_schedule.adapters.megatron.hooks import replace, stock_of
from paci_schedule.adapters.megatron.job import Deferred
from paci_schedule.adapters.megatron.renamed import Renamed
from paci_schedule.runtime.publication import OURS
from paci_schedule.runtime.waiting import together

__all__ = ["save_alongside"]


def save_alongside(
    owner: Any,
    name: str,
    folder: Callable[..., Path],
    settings: Renamed,
    deferred: Deferred,
    stage: int,
    timeout: timedelta,
) -> None:
    """Let every checkpoint hold what is deferred.

    Args:
        owner, name: the method that saves one.
        folder: that of the checkpoint, of the method's arguments.
        settings: of the job; what is saved of them is as the user gave it.
        deferred, stage, timeout: as of `Job.keep_deferred`.
    """
    stock = stock_of(owner, name)

    def save(*rest: Any, **named: Any) -> None:
        write = deferred()
        saving, also = together(stage, "saved a checkpoint", timeout), _also(write, folder(*rest, **named))
        with saving, also, settings.as_given():
            stock(*rest, **named)

    replace(owner, name, save)


@contextmanager
def _also(write: Callable[[Path], None], folder: Path) -> Iterator[None]:
    """While it lasts, what is ours is written into a checkpoint's folder too, before anything names the checkpoint."""
    stock = dist_checkpointing.save

    def save(state: Any, target: Any, *rest: Any, **named: Any) -> Any:
        done = stock(state, target, *rest, **named)
        if Path(target) == folder:
            write(folder / OURS)
        return done

    dist_checkpointing.save = save
    try:
        yield
    finally:
        dist_checkpointing.save = stock

"""Checkpoints of a Megatron-LM job that are complete or not there.

Megatron-LM writes into the folder of the iteration and then overwrites the file that names the newest one.  Here it is
given other names for both while it saves; when all ranks have written, the folder gets its own name
(`runtime.publication`), and only then the file names it.
"""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from paci_schedule.adapters.megatron.hooks import loaded
from paci_schedule.errors import CheckpointError
from paci_schedule.runtime import publication
from paci_schedule.runtime.meeting import Meetings
from paci_schedule.runtime.waiting import together

__all__ = ["RENAMED", "check_named", "folder_of", "published"]

RENAMED = ("get_checkpoint_name", "get_checkpoint_tracker_filename")
"""The functions of megatron.training.checkpointing that give other names here."""

_TRACKER = "latest_checkpointed_iteration.txt"


def folder_of(save: str, iteration: int) -> Path:
    """The folder of a checkpoint."""
    return Path(save, f"iter_{iteration:07d}")


@contextmanager
def published(args: Namespace, iteration: int, stage: int, meetings: Meetings, timeout: timedelta) -> Iterator[Path]:
    """While it lasts, Megatron-LM saves; at its end the checkpoint is complete and named.

    Args:
        args: Megatron-LM's arguments.
        iteration: of the checkpoint.
        stage, timeout: as of `waiting`.
        meetings: of the job.

    Yields:
        The folder as it is while it is written.

    Raises:
        CheckpointError: on every rank, if it could not be published.
        LinkError: a rank did not come in time.
    """
    final, tracker = folder_of(args.save, iteration), Path(args.save, _TRACKER)
    new, scratch = final.with_name(publication.unfinished(final.name)), Path(args.save, f"{_TRACKER}.unfinished")
    keeps = dist.get_rank() == 0
    _meet(meetings, "began to save a checkpoint", partial(_clear, final, new) if keeps else None)
    with _renamed(args, final.name, scratch), together(stage, "saved a checkpoint", timeout):
        yield new
    # Whoever has written on a node, the node's own copies of the pages go to the disk.
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    _meet(meetings, "saved a checkpoint", partial(_sync, new) if is_first else None)
    publish = partial(_publish, final, new, iteration, tracker, scratch, getattr(args, "save_retain_interval", None))
    _meet(meetings, "published a checkpoint", publish if keeps else None)


def check_named(args: Namespace) -> None:
    """Raises CheckpointError if the checkpoint that the arguments ask to load is torn, or the file that names it."""
    tracker = Path(args.load or "", _TRACKER)
    iteration = getattr(args, "ckpt_step", None)
    if not args.load or (iteration is None and not tracker.is_file()):
        return
    named = tracker.read_text().strip() if iteration is None else str(iteration)
    if not named:
        raise CheckpointError(
            f"{str(tracker)!r} is empty: a save was cut off before it named its checkpoint; write the number of an "
            "iteration beside it into the file, or say --ckpt-step"
        )
    if named.isdecimal():
        publication.restore(folder_of(args.load, int(named)))
        publication.check(folder_of(args.load, int(named)))


@contextmanager
def _renamed(args: Namespace, name: str, scratch: Path) -> Iterator[None]:
    """While it lasts, Megatron-LM's folder and tracker have other names, and it removes no older checkpoint."""
    module = loaded("megatron.training.checkpointing")
    folder, tracker = module.get_checkpoint_name, module.get_checkpoint_tracker_filename
    retains = getattr(args, "save_retain_interval", None)
    module.get_checkpoint_name = partial(_unfinished, folder, name)
    module.get_checkpoint_tracker_filename = lambda _: str(scratch)
    args.save_retain_interval = None
    try:
        yield
    finally:
        module.get_checkpoint_name, module.get_checkpoint_tracker_filename = folder, tracker
        args.save_retain_interval = retains


def _unfinished(stock: Callable[..., str], name: str, *values: Any, **named: Any) -> str:
    return stock(*values, **named).replace(f"{os.sep}{name}", f"{os.sep}{publication.unfinished(name)}", 1)


def _clear(final: Path, new: Path) -> None:
    publication.restore(final)
    if new.exists():
        shutil.rmtree(new)


def _sync(folder: Path) -> None:
    for name in publication.sizes(folder):
        publication.sync(folder / name)


def _publish(final: Path, new: Path, iteration: int, tracker: Path, scratch: Path, retains: int | None) -> None:
    named = tracker.read_text().strip() if tracker.is_file() else ""
    before = int(named) if named.isdecimal() else 0
    publication.publish(final, publication.sizes(new), iteration)
    publication.write_whole(tracker, str(iteration))
    scratch.unlink(missing_ok=True)
    if retains and before not in (0, iteration) and before % retains:  # as Megatron-LM does
        old = folder_of(str(final.parent), before)
        if not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)


def _meet(meetings: Meetings, doing: str, action: Callable[[], object] | None) -> None:
    """Come together after an action of this rank, whose error all ranks raise."""
    error = None
    try:
        if action is not None:
            action()
    except OSError as raised:
        error = f"{type(raised).__name__}: {raised}"
    failed = [f"rank {rank}: {error}" for rank, error in enumerate(meetings.gather(doing, error)) if error]
    if failed:
        raise CheckpointError(
            f"the checkpoint was not saved: {'; '.join(failed[:4])}.  The one before it is untouched; make room, and "
            "start again from it"
        )

"""Checkpoints of a Megatron-LM job that are complete or not there.

Megatron-LM writes into the folder of the iteration and then overwrites the file that names the newest one.  Here it is
given other names for both while it saves; when all ranks have written, the folder gets its own name
(`runtime.publication`), and only then the file names it.  Local checkpoints, which every rank writes for itself, are
another matter: nvidia-resiliency-ext takes only those of which every rank has its part.
"""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from paci_schedule.adapters.megatron.background import Steps, carry_out
from paci_schedule.adapters.megatron.hooks import loaded
from paci_schedule.core.files import read_text
from paci_schedule.errors import CheckpointError
from paci_schedule.runtime import publication
from paci_schedule.runtime.meeting import Meetings
from paci_schedule.runtime.waiting import together

__all__ = ["RENAMED", "Publishing", "beside", "check_named", "folder_of", "named"]

RENAMED = (
    "cleanup_old_non_persistent_checkpoint",
    "get_checkpoint_name",
    "get_checkpoint_tracker_filename",
)
"""The functions of megatron.training.checkpointing that are others here while a checkpoint is saved."""

_TRACKER = "latest_checkpointed_iteration.txt"
_LONGEST_NUMBER = 100  # bytes
_GIVE_THE_NUMBER = "write the number of an iteration beside it into the file, or say --ckpt-step"


def folder_of(save: str | Path, iteration: int) -> Path:
    """The folder of a checkpoint."""
    return Path(save, f"iter_{iteration:07d}")


def beside(save: str | Path, iteration: int) -> Path:
    """The folder for what we keep of a local checkpoint."""
    return folder_of(Path(save, publication.OURS), iteration)


def _non_persistent(args: Namespace, folder: str | None) -> Path | None:
    """The folder of the non-persistent checkpoints that every rank can read; None if the job has none.

    Args:
        args: Megatron-LM's arguments.
        folder: --save or --load.
    """
    if getattr(args, "non_persistent_ckpt_type", None) != "global":
        return None
    given = args.non_persistent_global_ckpt_dir or (folder and Path(folder, "non_persistent"))
    return Path(given) if given else None


class Publishing:
    """How the checkpoints of a job are saved.

    Args:
        args: Megatron-LM's arguments.
        stage, timeout: as of `waiting`.
        meetings: of the job.
    """

    def __init__(self, args: Namespace, stage: int, meetings: Meetings, timeout: timedelta) -> None:
        self._args, self._meetings = args, meetings
        self._saving = partial(together, stage, "saved a checkpoint", timeout)

    def save(self, iteration: int, transient: bool, stock: Callable[[], Any], write: Callable[[Path], None]) -> Any:
        """Let Megatron-LM save a checkpoint, which is complete and named when it is finished.

        Args:
            iteration: of the checkpoint.
            transient: whether it is one of the non-persistent ones.
            stock: calls Megatron-LM's own function.
            write: writes what is ours into a folder.

        Returns:
            what `stock` does.

        Raises:
            CheckpointError: on every rank, if it could not be published.
            LinkError: a rank did not come in time.
        """
        root = _non_persistent(self._args, self._args.save) if transient else Path(self._args.save)
        if root is None:
            write(beside(self._args.save, iteration))
            with self._saving():
                return carry_out(stock, partial(self._finish_local, iteration))
        final = folder_of(root, iteration)
        new = final.with_name(publication.unfinished(final.name))
        _meet(self._meetings, "began to save a checkpoint", partial(_clear, final, new) if _keeps() else None)

        def save() -> Any:
            with self._renamed(final):
                done = stock()
                write(new / publication.OURS)
            return done

        return carry_out(save, partial(self._finish, final, new, iteration, transient))

    def _finish(self, final: Path, new: Path, iteration: int, transient: bool, steps: Steps) -> None:
        """All ranks have written: Megatron-LM's last steps, and the checkpoint gets its name."""
        with self._renamed(final):
            for step in steps:
                step()
        self._meetings.gather("wrote a checkpoint")
        # Whoever has written on a node, the node's own copies of the pages go to the disk.
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        _meet(self._meetings, "saved a checkpoint", partial(_sync, new) if is_first else None)
        retains = getattr(self._args, "save_retain_interval", None)
        outdated = _outdated_transient if transient else partial(_outdated, retains)
        publish = partial(_publish, final, new, iteration, outdated)
        _meet(self._meetings, "published a checkpoint", publish if _keeps() else None)

    def _finish_local(self, iteration: int, steps: Steps) -> None:
        """All ranks have their part of a local checkpoint: what we keep of those before goes, as they do."""
        with self._saving():
            for step in steps:
                step()
        self._meetings.gather("saved a local checkpoint")
        newest = beside(self._args.save, iteration)
        for state in newest.parent.glob("iter_*") if _keeps() else ():
            if state != newest and not Path(self._args.save, state.name).exists():
                shutil.rmtree(state, ignore_errors=True)

    @contextmanager
    def _renamed(self, final: Path) -> Iterator[None]:
        """While it lasts, Megatron-LM's folder and tracker have other names, and it removes no older checkpoint."""
        module = loaded("megatron.training.checkpointing")
        stock = {name: getattr(module, name) for name in RENAMED}
        retains = getattr(self._args, "save_retain_interval", None)
        module.get_checkpoint_name = partial(_unfinished, module.get_checkpoint_name, final.name)
        module.get_checkpoint_tracker_filename = lambda _: str(_scratch(final))
        module.cleanup_old_non_persistent_checkpoint = lambda *_, **__: None
        self._args.save_retain_interval = None
        try:
            with self._saving():
                yield
        finally:
            vars(module).update(stock)
            self._args.save_retain_interval = retains


def check_named(args: Namespace) -> None:
    """Raises CheckpointError if the checkpoint that the arguments ask to load is torn, or the file that names it."""
    folder = named(args)
    if folder is not None:
        publication.restore(folder)
        publication.check(folder)


def named(args: Namespace) -> Path | None:
    """The folder of the checkpoint that the arguments ask to load; None for none, or one of another kind.

    Of a persistent and a non-persistent checkpoint Megatron-LM takes the one of the later iteration.

    Raises:
        CheckpointError: a file that names one is empty.
    """
    if not args.load:
        return None
    transient = _non_persistent(args, args.load)
    found = {Path(args.load): getattr(args, "ckpt_step", None) or _named_in(Path(args.load))}
    if transient is not None:
        found[transient] = _named_in(transient)
    newest = max(found, key=lambda root: (found[root] or 0, root == transient))
    iteration = found[newest]
    return None if iteration is None else folder_of(newest, iteration)


def _named_in(root: Path) -> int | None:
    """The iteration of the newest checkpoint in a folder; None where there is none, or a release."""
    said = _said(root / _TRACKER)
    if said == "":
        raise CheckpointError(
            f"{str(root / _TRACKER)!r} is empty: a save was cut off before it named its checkpoint; {_GIVE_THE_NUMBER}"
        )
    return int(said) if said and said.isdecimal() else None


def _said(tracker: Path) -> str | None:
    if not tracker.exists():
        return None
    try:
        return read_text(tracker, _LONGEST_NUMBER).strip()
    except ValueError as error:
        raise CheckpointError(f"{str(tracker)!r}: {error}, so it names no checkpoint; {_GIVE_THE_NUMBER}") from None


def _keeps() -> bool:
    """Whether this rank looks after the folders."""
    return dist.get_rank() == 0


def _scratch(final: Path) -> Path:
    return final.with_name(f"{_TRACKER}.unfinished")


def _unfinished(stock: Callable[..., str], name: str, *values: Any, **options: Any) -> str:
    return stock(*values, **options).replace(f"{os.sep}{name}", f"{os.sep}{publication.unfinished(name)}", 1)


def _clear(final: Path, new: Path) -> None:
    publication.restore(final)
    if new.exists():
        shutil.rmtree(new)


def _sync(folder: Path) -> None:
    for name in publication.sizes(folder):
        publication.sync(folder / name)


def _publish(final: Path, new: Path, iteration: int, outdated: Callable[[Path, int | None], Iterable[Path]]) -> None:
    tracker = final.with_name(_TRACKER)
    said = _said(tracker)
    before = int(said) if said and said.isdecimal() and int(said) != iteration else None
    publication.publish(final, publication.sizes(new), iteration)
    publication.write_whole(tracker, str(iteration))
    _scratch(final).unlink(missing_ok=True)
    for old in outdated(final, before):
        if not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)


def _outdated(retains: int | None, final: Path, before: int | None) -> Iterator[Path]:
    """What Megatron-LM removes when a checkpoint is saved: the one before, but for one in so many iterations."""
    if retains and before and before % retains:
        yield folder_of(final.parent, before)


def _outdated_transient(final: Path, before: int | None) -> Iterator[Path]:
    """The same of non-persistent checkpoints: those older than the one before."""
    kept = {final.name} if before is None else {final.name, folder_of("", before).name}
    for each in final.parent.glob("iter_*"):
        if each.name.removeprefix("iter_").isdecimal() and each.name not in kept:
            yield each


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

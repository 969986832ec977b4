"""Checkpoints that are complete or not there: what DeepSpeed writes is published when all ranks have written.

DeepSpeed hands every file to a checkpoint engine, and tells it on every rank when there is no more to write; its own
engine does nothing then, and rank 0 lets ``latest`` name what others may still be writing.  Here an engine around that
one notes the files of this rank, and publishes the folder at that moment (`runtime.publication`).
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paci_schedule.core.files import read_text
from paci_schedule.errors import CheckpointError
from paci_schedule.runtime import publication
from paci_schedule.runtime.meeting import Meetings

__all__ = ["PublishingEngine", "agree", "find", "node_of"]

_LATEST = "latest"
_LONGEST_TAG = 4096  # bytes, as of a path
_GIVE_THE_TAG = "give load_checkpoint the tag of a folder beside it"
_BEGAN = "began to save a checkpoint"


class PublishingEngine:
    """A checkpoint engine for one save: it writes by DeepSpeed's, and publishes what all ranks have written.

    An error of a file is kept until the ranks meet, so that all of them raise it and none waits in DeepSpeed's barrier.

    Args:
        engine: DeepSpeed's, or one of the user's own that writes files before `save` returns.
        meetings: of the job.
        final: the folder that the checkpoint shall have; it is saved under the name that `publication.unfinished` says.
        update: the number of updates that its weights have gone through.
        publishes: whether this rank publishes the folder: one of the job, or of each node that has a folder of its own.
        node: what ranks that write to the same folder have in common.
        latest: the file to name the checkpoint in; None for none, and on all ranks but one.
    """

    def __init__(
        self,
        engine: Any,
        meetings: Meetings,
        final: Path,
        update: int,
        *,
        publishes: bool,
        node: str,
        latest: Path | None,
    ) -> None:
        self._engine, self._meetings, self._final, self._update = engine, meetings, final, update
        self._publishes, self._node, self._latest = publishes, node, latest
        self._folder = final.with_name(publication.unfinished(final.name))
        self._sizes: dict[str, int] = {}
        self._errors: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def begin(self) -> None:
        """All ranks have come to save; what a save that was cut off has left behind is gone."""
        words = self._meet(_BEGAN, self._clear if self._publishes else None, said=self._final.name)
        if len(names := sorted(set(words))) > 1:
            raise CheckpointError(
                f"tag={self._final.name!r}: other ranks save under other tags ({', '.join(names)}), and none of "
                "the checkpoints would be whole; give save_checkpoint the same tag on every rank"
            )

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._attempt(path, lambda: os.makedirs(path, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        self._attempt(path, lambda: self._write(state_dict, Path(path)))

    def commit(self, info: Any) -> bool:
        """All ranks have written: publish the checkpoint.  Raises CheckpointError on all ranks if one could not."""
        done = self._engine.commit(info)
        words = self._meet("saved a checkpoint", said={"node": self._node, "files": self._sizes})
        files = {name: size for word in words if word["node"] == self._node for name, size in word["files"].items()}
        self._meet("published a checkpoint", (lambda: self._publish(files)) if self._publishes else None)
        return done

    def _write(self, state: Any, path: Path) -> None:
        self._engine.save(state, str(path))
        if path.is_file():
            publication.sync(path)
            self._sizes[str(path.relative_to(self._folder))] = path.stat().st_size

    def _clear(self) -> None:
        publication.restore(self._final)
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def _publish(self, files: dict[str, int]) -> None:
        publication.publish(self._final, files, self._update)
        if self._latest is not None:
            publication.write_whole(self._latest, self._final.relative_to(self._latest.parent).as_posix())

    def _attempt(self, path: object, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, the other ranks shall hear of it
            self._errors.append(f"{path}: {type(error).__name__}: {error}")

    def _meet(self, doing: str, action: Callable[[], object] | None = None, said: Any = None) -> list[Any]:
        """Come together after an action of this rank.  Returns what the ranks have said."""
        if action is not None:
            self._attempt(self._final, action)
        words = self._meetings.gather(doing, {"errors": self._errors, "said": said})
        failed = [f"rank {rank}: {error}" for rank, word in enumerate(words) for error in word["errors"]]
        if failed:
            more = f" (and {len(failed) - 4} more)" if len(failed) > 4 else ""
            raise CheckpointError(
                f"the checkpoint {str(self._final)!r} was not saved: {'; '.join(failed[:4])}{more}.  The one before it "
                "is untouched, and training may go on"
            )
        return [word["said"] for word in words]


def node_of(local: bool) -> str:
    """What ranks that write to the same folder have in common; `local`: every node has a folder of its own."""
    return socket.gethostname() if local else ""


def find(load_dir: str, tag: str | None, meetings: Meetings, looks: bool) -> str | None:
    """The tag to load, which all ranks agree on and whose files are as they were saved.

    Args:
        load_dir, tag: as given to `load_checkpoint`.
        meetings: of the job.
        looks: whether this rank looks at the folder: one of the job, or of each node.

    Returns:
        None where no tag is given and there is no file ``latest``.

    Raises:
        CheckpointError: on every rank: ``latest`` is empty, or files are missing or short.
    """
    error = None
    if looks:
        try:
            if tag is None and (latest := Path(load_dir, _LATEST)).is_file():
                tag = _named_in(latest)
            if tag is not None:
                publication.restore(Path(load_dir, tag))
                publication.check(Path(load_dir, tag))
        except (CheckpointError, OSError) as found:
            error = str(found)
    words = meetings.gather("began to load a checkpoint", [tag, error])
    errors = [error for _, error in words if error]
    if errors:
        raise CheckpointError(errors[0])
    return words[0][0]


def _named_in(latest: Path) -> str:
    try:
        tag = read_text(latest, _LONGEST_TAG).strip()
    except ValueError as error:
        raise CheckpointError(f"{str(latest)!r}: {error}, so it names no checkpoint; {_GIVE_THE_TAG}") from None
    if not tag:
        raise CheckpointError(f"{str(latest)!r} is empty: a save was cut off before it named one; {_GIVE_THE_TAG}")
    return tag


def agree(meetings: Meetings, path: str | None, update: int, failed: Exception | None) -> None:
    """What DeepSpeed has loaded belongs together; what one rank could not load, none has.

    Args:
        meetings: of the job.
        path: of the checkpoint.
        update: the number of updates that this rank's part has gone through.
        failed: what this rank's loading raised.

    Raises:
        CheckpointError: another rank could not load its part, or the parts are of different updates.
    """
    error = None if failed is None else f"{type(failed).__name__}: {failed}"
    try:
        words = meetings.gather("loaded a checkpoint", [update, error])
    finally:
        if failed is not None:
            raise failed
    errors = [f"rank {rank} could not load its part: {error}" for rank, (_, error) in enumerate(words) if error]
    if errors:
        raise CheckpointError(errors[0])
    updates = sorted({update for update, _ in words})
    if len(updates) > 1:
        raise CheckpointError(
            f"{path!r}: the ranks' parts are of the updates {', '.join(map(str, updates))}, so two saves under one "
            "tag are mixed; load another checkpoint"
        )

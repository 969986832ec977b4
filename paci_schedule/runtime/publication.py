"""How a folder that many ranks write becomes a checkpoint: it is complete under its name, or it is not there.

The ranks write into the folder ``NAME.unfinished``, and each one brings its files to the disk.  When all have said that
they have, one rank writes the manifest, renames the folder to ``NAME``, and then lets the file that names the newest
checkpoint name this one.  A folder that had the name steps aside as ``NAME.replaced`` between the two renames; after a
death between them `restore` puts things right.

The manifest lists the files with their sizes, so that one that went missing or was cut short later is noticed before
anything is loaded.  A checkpoint without a manifest is a framework's own, and so is one that a framework has written
again since.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paci_schedule.core.files import read_json
from paci_schedule.errors import CheckpointError

__all__ = ["MANIFEST", "OURS", "check", "publish", "restore", "sizes", "sync", "unfinished", "write_whole"]

MANIFEST = "paci_manifest.json"
OURS = "paci_schedule"
"""The folder in a checkpoint's folder with files that no framework knows."""

_UNFINISHED, _REPLACED = ".unfinished", ".replaced"
_LARGEST_MANIFEST = 64 << 20  # bytes: about half a million files


def unfinished(name: str) -> str:
    """The name that a checkpoint has while it is written."""
    return name + _UNFINISHED


def sync(path: Path) -> None:
    """Bring a file to the disk, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a file that has either its old content or the new one, whenever one looks."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    sync(new)
    os.replace(new, path)
    sync(path.parent)


def sizes(folder: Path) -> dict[str, int]:
    """The files below a folder and their sizes in bytes, by their paths in it."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def publish(final: Path, files: Mapping[str, int], update: int) -> None:
    """Give the folder that was written for `final` its name; one rank does so, when all files are on the disk.

    Args:
        final: the checkpoint's folder.
        files: as of `sizes`, what it contains.
        update: the number of updates that its weights have gone through.
    """
    new, old = final.with_name(unfinished(final.name)), final.with_name(final.name + _REPLACED)
    write_whole(new / MANIFEST, json.dumps({"update": update, "files": dict(sorted(files.items()))}, indent=1))
    for folder in {new, *((new / name).parent for name in files)}:
        sync(folder)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    new.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore(final: Path) -> None:
    """After a death between the two renames of `publish`: the new checkpoint is complete, and gets its name."""
    new = final.with_name(unfinished(final.name))
    if not final.exists() and (new / MANIFEST).is_file():
        new.rename(final)
        sync(final.parent)


def check(final: Path) -> None:
    """Raises CheckpointError, which names the files, if the checkpoint lacks what its manifest lists."""
    if final.name.endswith(_UNFINISHED) and final.is_dir():
        raise CheckpointError(
            f"{str(final)!r}: a save that did not come to its end, so files are missing or short; load another "
            "checkpoint, and remove this folder"
        )
    if not (final / MANIFEST).is_file():
        return
    try:
        listed: Any = read_json(final / MANIFEST, _LARGEST_MANIFEST)
        if _written_again(final, listed["files"]):
            return
        wrong = list(_wrong(final, listed["files"]))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        wrong = [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]
    if wrong:
        more = f", and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(
            f"{str(final)!r}: not as it was saved: {'; '.join(wrong[:8])}{more}; load another checkpoint, or bring the "
            f"files back.  ({MANIFEST} lists what was saved; without it the framework loads the folder as it is.)"
        )


def _written_again(folder: Path, files: Mapping[str, int]) -> bool:
    """Whether a framework has saved here itself since: all its files are newer than the manifest."""
    since = (folder / MANIFEST).stat().st_mtime_ns
    theirs = [folder / name for name in files if not name.startswith(f"{OURS}{os.sep}")]
    return bool(theirs) and all(path.is_file() and path.stat().st_mtime_ns > since for path in theirs)


def _wrong(folder: Path, files: Mapping[str, int]) -> Iterator[str]:
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif (found := path.stat().st_size) != size:
            yield f"{name} has {found} of {size} bytes"

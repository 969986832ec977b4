"""Where the text comes from: the Python standard library on this machine, local files, or a dataset of the hub."""

from __future__ import annotations

import glob
import hashlib
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, disable_progress_bars, load_dataset

from launch.errors import LaunchError

__all__ = ["Corpus", "open_corpus"]

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """A collection of documents."""

    name: str
    """What a reader calls it."""

    identity: str
    """Changes when the documents may have changed; caches are keyed by it."""

    load: Callable[[], Dataset]
    """Reads the documents: a dataset with one string column, "text"."""


def open_corpus(source: str = "stdlib", *, split: str = "train", column: str = "text") -> Corpus:
    """The corpus that `source` names.  Nothing is read before `load`.

    Args:
        source: "stdlib", the sources of the running Python's standard library (about 12 MB, no download);
            "hub:NAME" or "hub:NAME:CONFIG", a dataset of the Hugging Face hub; else a path or glob of text files.
        split: the split of a hub dataset.
        column: the text column of a hub dataset.

    Raises:
        LaunchError: no file matches `source`.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found = {
            path.relative_to(root).as_posix(): path
            for path in root.rglob("*.py")
            if not _NOT_LIBRARY & set(path.relative_to(root).parts)
        }
        return _files(f"Python {sys.version.split()[0]} standard library", found)
    if source.startswith("hub:"):
        return _hub(source, split, column)
    found = {path: Path(path) for path in glob.glob(source, recursive=True) if Path(path).is_file()}
    if not found:
        raise LaunchError(
            f"data {source!r}: no such file; name a text file, a glob such as 'books/**/*.txt', "
            "'hub:NAME' for a dataset of the hub, or 'stdlib'"
        )
    return _files(source, found)


def _hub(source: str, split: str, column: str) -> Corpus:
    name, _, configuration = source.removeprefix("hub:").partition(":")

    def load() -> Dataset:
        try:
            documents = load_dataset(name, configuration or None, split=split)
        except (OSError, ValueError) as error:
            raise LaunchError(
                f"data {source!r}: the hub has no such dataset, configuration or split, or cannot be reached ({error})"
            ) from error
        if column not in documents.column_names:
            raise LaunchError(f"data {source!r}: no column {column!r} among {', '.join(documents.column_names)}")
        return documents.select_columns(column).rename_columns({column: "text"})

    return Corpus(name=source.removeprefix("hub:"), identity=f"{source} {split} {column}", load=load)


def _files(name: str, named: dict[str, Path]) -> Corpus:
    """One document a file, in an order that mixes folders: the last twentieth, held out, is then like the rest."""
    mixed = [named[key] for key in sorted(named, key=lambda key: hashlib.sha256(key.encode()).digest())]
    sizes = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in mixed]

    def load() -> Dataset:
        disable_progress_bars()
        files = [str(path) for path in mixed]
        return load_dataset(
            "text", data_files=files, sample_by="document", encoding="utf-8", encoding_errors="replace", split="train"
        )

    return Corpus(name=name, identity=repr(sizes), load=load)

"""Where a rank stood when it ended with an error: the file that it writes, and what the files of all ranks tell.

A rank writes ``position-rank3.json``, also where another one's error ends the job.  A rank that was killed writes none,
and that is what tells it apart: the others name it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from paci_schedule.core.files import read_json
from paci_schedule.errors import ConfigError

__all__ = ["Position", "missing", "read_all", "write_position"]

_LARGEST = 1 << 20  # bytes of a file


@dataclass(frozen=True)
class Position:
    """Where one rank stood.

    Attributes:
        rank, stage, replica: which one; `ranks` and `stages` of how many.
        at: when, in seconds since 1970.
        op: the op that it ran, as it prints; "" between two calls.
        version: updates applied.
        forwards, backwards: micro-batches done.
        in_flight: micro-batches between their forward and backward.
        waits_for: the ranks that it waited for; none where something else went wrong, or it was at work.
        error: the first line of what it says; "" where another rank's error ended the job.
        posted: messages that were not done.
        newest: the newest ops as (op, start, end), in seconds before `at`.
        stack: the Python stack.
    """

    rank: int
    ranks: int
    stage: int
    stages: int
    replica: int
    at: float
    op: str
    version: int
    forwards: int
    backwards: int
    in_flight: int
    waits_for: Sequence[int]
    error: str
    posted: Sequence[str]
    newest: Sequence[tuple[str, float, float]]
    stack: str


def write_position(folder: str, position: Position) -> Path:
    """Write the file of one rank; an older one of the rank is replaced."""
    path = Path(folder, f"position-rank{position.rank}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(asdict(position), indent=1))
    os.replace(new, path)
    return path


def read_all(folder: Path) -> list[Position]:
    """The positions in a folder, by rank.

    Raises:
        ConfigError: there are none, or a file is none.
    """
    paths = sorted(folder.glob("position-rank*.json"))
    if not paths:
        raise ConfigError(
            f"folder={str(folder)!r}: no rank has left a position here (position-rank*.json); name the folder that "
            '"record" named in the job that ended'
        )
    return sorted(map(_read, paths), key=lambda position: position.rank)


def missing(positions: Iterable[Position]) -> list[int]:
    """The ranks of the job that have left no position."""
    there = {position.rank: position.ranks for position in positions}
    return [rank for rank in range(max(there.values())) if rank not in there]


def _read(path: Path) -> Position:
    try:
        found = read_json(path, _LARGEST)
        wrong = [field.name for field in fields(Position) if not _fits(found[field.name], str(field.type))]
        if wrong or not 0 <= found["rank"] < found["ranks"] <= 1 << 20:
            raise ValueError(f"wrong values of {wrong or 'rank'}")
        return Position(**{field.name: found[field.name] for field in fields(Position)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"folder={str(path.parent)!r}: {path.name} is no position ({type(error).__name__}: {error}); remove it"
        ) from None


def _fits(value: object, kind: str) -> bool:
    if kind.startswith("Sequence[tuple"):
        return isinstance(value, list) and all(isinstance(each, list) and len(each) == 3 for each in value)
    if kind.startswith("Sequence"):
        return isinstance(value, list) and all(isinstance(each, int | str) for each in value)
    return isinstance(value, {"int": int, "float": float, "str": str}[kind])

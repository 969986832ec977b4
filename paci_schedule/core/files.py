"""Files that users give, read as data, of no more bytes than a limit."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

__all__ = ["parse_json", "read_json", "read_text"]


def read_text(path: Path, largest: int) -> str:
    """The text of a file in UTF-8.

    Args:
        path: a regular file; a pipe or a device might never end, or never begin.
        largest: bytes that it may have; no more are read.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, has too many bytes, or is not in UTF-8.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest} bytes, the most that is read")
    return content.decode()


def read_json(path: Path, largest: int) -> Any:
    """The value that a file holds in JSON; the arguments and errors are those of `read_text`.

    Raises:
        ValueError: besides, it is no JSON, or is nested too deeply.
    """
    return parse_json(read_text(path, largest))


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: as of `read_json`.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None

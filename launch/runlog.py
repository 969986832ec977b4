"""The log of a run: JSON lines, one record an event (start, update, validation, end)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.errors import LaunchError

__all__ = ["LOG_NAME", "RunLog", "read_log"]

LOG_NAME = "log.jsonl"

Record = dict[str, Any]


class RunLog:
    """Appends records to `folder`/log.jsonl; without a folder it writes nothing (ranks that do not log)."""

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / LOG_NAME
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def rewind(self, update: int) -> float:
        """Drop what was logged after `update`; 0 empties the log.  Returns the training seconds spent until there."""
        if self._path is None:
            return 0.0
        records = read_log(self._path) if update and self._path.exists() else []
        kept = [record for record in records if record["event"] != "end" and record.get("update", 0) <= update]
        self._path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        return max((record["seconds"] for record in kept if "seconds" in record), default=0.0)

    def write(self, event: str, **facts: Any) -> None:
        """Append one record."""
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"event": event, **facts}) + "\n")


def read_log(path: Path) -> list[Record]:
    """The records of a log file, oldest first.

    Raises:
        LaunchError: there is no such file, or a line of it is not a record.
    """
    if not path.is_file():
        raise LaunchError(f"log {str(path)!r}: no such file; name the folder a run wrote with --output")
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise LaunchError(f"log {str(path)!r}: not JSON lines ({error}); was the run cut off while writing?") from None

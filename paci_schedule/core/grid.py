"""The ops of every stage as a text grid: one line a stage, ops separated by blanks, commas or semicolons."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from paci_schedule.core.ops import Op
from paci_schedule.errors import ScheduleError

__all__ = ["marked", "read", "write"]

_LABEL = re.compile(r"\s*stage\s+\d+\s*[,;:]?\s*", re.IGNORECASE)


def read(text: str) -> list[list[Op]]:
    """The ops of every stage of a grid.

    A line may begin with its label (`stage 3`).  Cells that are empty or `.`, empty lines and lines that begin with
    # are skipped.

    Raises:
        ScheduleError: a cell is not an op, and the message names its line; or there is no line at all.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = re.split(r"[\s,;]+", _LABEL.sub("", line, count=1).strip())
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                rows.append([Op.parse(word) for word in words if word.strip(".")])
            except ScheduleError as error:
                raise ScheduleError(f"line {number}: {error}") from None
    if not rows:
        raise ScheduleError("the grid is empty: write one line a stage, for example 'F0 B0 STEP0'")
    return rows


def write(rows: Sequence[Sequence[Op]]) -> str:
    """The grid as text, which `read` turns back into the same ops."""
    return "\n".join(f"stage {stage:<3} " + " ".join(map(str, ops)) for stage, ops in enumerate(rows))


def marked(rows: Mapping[int, Sequence[Op]], marks: Mapping[int, int], context: int = 6) -> str:
    """The rows as a text grid: of each row the marked op, in >...<, and `context` ops before and after it."""
    lines = []
    for stage, ops in rows.items():
        mark = marks[stage]
        window = range(max(0, mark - context), min(len(ops), mark + context + 1))
        cells = [f">{ops[at]}<" if at == mark else str(ops[at]) for at in window]
        lines.append(
            f"  stage {stage:<3} "
            + ("... " if window.start else "")
            + " ".join(cells)
            + (" ..." if window.stop < len(ops) else "")
        )
    return "\n".join(lines)

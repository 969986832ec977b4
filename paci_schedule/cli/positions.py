"""`paci doctor FOLDER`: the positions that the ranks of a job left when it ended, in one grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from paci_schedule.trace import Position, missing

__all__ = ["findings", "grid"]

_NEWEST = 6  # ops of a rank in the grid


def grid(positions: Sequence[Position]) -> Table:
    """A row for each rank: where it stood, for whom it waited, and its newest ops, in seconds before the first end."""
    table = Table(
        "rank", "stage", "op", "version", "F", "B", "in flight", "waits for", "newest ops (seconds)", box=None
    )
    first = min(position.at for position in positions)
    for position in positions:
        shift = position.at - first
        newest = "  ".join(f"{op} {start + shift:+.2f}" for op, start, _ in position.newest[-_NEWEST:])
        counts = (position.version, position.forwards, position.backwards, position.in_flight)
        nobody = "[red]nobody: it failed itself[/]" if position.error else "nobody: it is at work, or hangs"
        waits = ", ".join(f"rank {rank}" for rank in position.waits_for) or nobody
        table.add_row(
            str(position.rank),
            f"{position.stage} of {position.stages}",
            escape(position.op),
            *map(str, counts),
            waits,
            escape(newest),
        )
    for rank in missing(positions):
        table.add_row(str(rank), *["?"] * 6, "[red]left nothing: it is gone[/]", "")
    return table


def findings(positions: Sequence[Position]) -> dict[str, Any]:
    """What the positions tell.

    Returns:
        missing: ranks that have left no position;
        failed: ranks that waited for nobody, with their errors;
        at_work: ranks that waited for nobody, and had no error: they compute, or hang;
        waits: rank -> the ranks that it waited for;
        first: where to look first: the ranks that failed themselves; else, of those that are waited for, the ones that
            left nothing or were at work; else those that left nothing; else those that are waited for.
    """
    gone = missing(positions)
    nobody = [position for position in positions if not position.waits_for]
    failed = {position.rank: position.error for position in nobody if position.error}
    at_work = [position.rank for position in nobody if not position.error]
    waits = {position.rank: list(position.waits_for) for position in positions if position.waits_for}
    waited = {rank for ranks in waits.values() for rank in ranks}
    first = sorted(failed) or sorted(waited.intersection([*gone, *at_work])) or gone or sorted(waited)
    return {"missing": gone, "failed": failed, "at_work": at_work, "waits": waits, "first": first}

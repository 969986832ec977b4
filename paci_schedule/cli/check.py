"""`paci check`: compare a schedule, or a grid in a file, with the schedule's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paci_schedule.check.validate import check_grid, check_schedule
from paci_schedule.cli.options import at_least_one, json_option, shape_of, variant_options
from paci_schedule.cli.printing import print_json
from paci_schedule.core import grid
from paci_schedule.core.files import read_text
from paci_schedule.core.schedules.registry import SCHEDULES
from paci_schedule.errors import ConfigError, ScheduleError

__all__ = ["check"]

_LARGEST = 1 << 24  # bytes of a grid


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option("--schedule", "name", required=True, metavar="NAME", help=", ".join(SCHEDULES) + ".")
@click.option(
    "--stages", type=int, metavar="P", help="Number of pipeline stages; with FILE, its number of lines by default."
)
@click.option("--micro-batches", type=int, required=True, metavar="M", help="Number of micro-batches in a batch.")
@variant_options
@click.option("--batches", type=int, default=3, metavar="N", help="Number of batches to check (default 3).")
@json_option
def check(file: Path | None, stages: int | None, batches: int, as_json: bool, **options: Any) -> None:
    """Check a schedule against its rules, and that its messages never wait in a circle where engines can run it.

    With FILE, check a grid of ops instead; it has one line for each stage, such as F0 B0 STEP0.

    If a rule is broken, the grid is printed with the op marked, and the exit code is 1.
    """
    rows = grid.read(_read(file)) if file else None
    if stages is None:
        if rows is None:
            raise ConfigError("stages is missing: give --stages P, or a FILE with one line for each stage")
        stages = len(rows)
    chosen, spec = shape_of(stages=stages, **options)
    fault = ""
    try:
        if rows is None:
            check_schedule(chosen, spec, at_least_one("batches", batches))
        else:
            check_grid(chosen, spec, rows)
    except ScheduleError as error:
        fault = str(error)
    if as_json:
        shape = {"schedule": chosen.name, "stages": spec.stages, "micro_batches": spec.accumulation}
        print_json({"ok": not fault, "error": fault or None} | shape)
    else:
        click.echo(
            fault
            or f"ok: {file or chosen.name} is a valid {chosen.name} schedule of {spec.stages} stages and "
            f"{spec.accumulation} micro-batches a batch"
        )
    if fault:
        raise click.exceptions.Exit(1)


def _read(file: Path) -> str:
    try:
        return read_text(file, _LARGEST)
    except (OSError, ValueError) as error:
        raise ConfigError(f"file={str(file)!r}: cannot be read ({error}); name a text file") from None

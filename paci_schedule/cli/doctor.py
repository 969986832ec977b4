"""`paci doctor`: what is installed here; given a folder, what the ranks of a job left that ended."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path

import click
from rich.table import Table

from paci_schedule.cli.environment import examine
from paci_schedule.cli.options import json_option
from paci_schedule.cli.positions import findings, grid
from paci_schedule.cli.printing import print_json, screen
from paci_schedule.trace import read_all

__all__ = ["doctor"]


@click.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@json_option
def doctor(folder: Path | None, as_json: bool) -> None:
    """Examine this machine, or a job that ended.

    Say what is installed, whether it is supported, and whether each hook in the frameworks exists.  If something that
    PACI needs is missing, the exit code is 1.

    With FOLDER, which is what "record" named in a job: merge the positions that its ranks left there when an error
    ended them, and show which op each was at, who waited for whom, and who left nothing.
    """
    if folder is None:
        _examine_machine(as_json)
    else:
        _examine_job(folder, as_json)


def _examine_machine(as_json: bool) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # where frameworks log while they are imported
        found = list(examine())
    healthy = all(finding.ok for finding in found if finding.required)
    if as_json:
        print_json({"ok": healthy, "findings": [finding._asdict() for finding in found]})
    else:
        table = Table("", "what", "found", box=None)
        for finding in found:
            mark = "[green]ok[/]" if finding.ok else "[red]missing[/]" if finding.required else "[yellow]no[/]"
            table.add_row(mark, finding.name, finding.detail)
        screen().print(table)
    if not healthy:
        raise click.exceptions.Exit(1)


def _examine_job(folder: Path, as_json: bool) -> None:
    positions = read_all(folder)
    told = findings(positions)
    if as_json:
        print_json({**told, "positions": [asdict(position) for position in positions]})
        return
    screen().print(grid(positions))
    for position in positions:
        if position.error:
            screen().print(f"rank {position.rank}: {position.error}", markup=False)
        elif position.rank in told["first"]:
            screen().print(f"rank {position.rank} stood here:\n{position.stack}", markup=False)
    screen().print(f"Look first at rank {', '.join(map(str, told['first']))}.", markup=False)

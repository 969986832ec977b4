"""`paci doctor`: say what is installed here, whether it is supported, and whether each hook exists."""

from __future__ import annotations

import contextlib
import sys

import click
from rich.table import Table

from paci_schedule.cli.environment import examine
from paci_schedule.cli.options import json_option
from paci_schedule.cli.printing import print_json, screen

__all__ = ["doctor"]


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Examine this machine.

    Say what is installed, whether it is supported, and whether each hook in the frameworks exists.  If something that
    PACI needs is missing, the exit code is 1.
    """
    with contextlib.redirect_stdout(sys.stderr):  # where frameworks log while they are imported
        findings = list(examine())
    healthy = all(finding.ok for finding in findings if finding.required)
    if as_json:
        print_json({"ok": healthy, "findings": [finding._asdict() for finding in findings]})
    else:
        table = Table("", "what", "found", box=None)
        for finding in findings:
            mark = "[green]ok[/]" if finding.ok else "[red]missing[/]" if finding.required else "[yellow]no[/]"
            table.add_row(mark, finding.name, finding.detail)
        screen().print(table)
    if not healthy:
        raise click.exceptions.Exit(1)

"""Standard output: tables, grids and JSON."""

from __future__ import annotations

import json

import click
from rich.console import Console

from paci_schedule.draw.text import text
from paci_schedule.simulate.timeline import Timeline

__all__ = ["print_grid", "print_json", "screen"]


def screen() -> Console:
    """Standard output, as wide as the terminal, or 160 characters wide where there is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def print_json(value: object) -> None:
    click.echo(json.dumps(value))


def print_grid(console: Console, timeline: Timeline, width: int | None) -> None:
    """Print the timeline as text, with lines cut off at `width`, or else at the terminal's width if there is one."""
    fits = width or (console.width if console.is_terminal else None)
    console.print(text(timeline, fits), soft_wrap=True)

"""`paci show`: draw a schedule as text, as a picture or as a Chrome trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paci_schedule.cli.options import (
    at_least_one,
    costs_options,
    jobs,
    json_option,
    output_option,
    pipeline_options,
    slack_option,
    width_option,
)
from paci_schedule.cli.printing import print_grid, print_json, screen
from paci_schedule.draw.chrome import chrome_trace
from paci_schedule.draw.picture import picture
from paci_schedule.simulate.execute import simulate

__all__ = ["show"]


@click.command("show")
@pipeline_options
@costs_options
@slack_option
@click.option("--batches", type=int, default=1, metavar="N", help="Number of batches to draw (default 1).")
@width_option
@output_option
@json_option
def show(batches: int, width: int | None, output: Path | None, as_json: bool, **options: Any) -> None:
    """Draw a schedule as text, or with --output as a picture; --json prints the Chrome trace."""
    at_least_one("batches", batches)
    timelines = {
        f"{chosen.name}, {spec.stages} stages, {spec.accumulation} micro-batches": simulate(
            chosen, spec, costs, batches
        )
        for chosen, spec, costs in jobs(options)
    }
    if output:
        picture(timelines, output)
    if as_json:
        print_json(chrome_trace(timelines))
    elif not output:
        console = screen()
        for title, timeline in timelines.items():
            if len(timelines) > 1:
                console.print(title)
            print_grid(console, timeline, width)

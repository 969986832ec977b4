"""`paci show`: draw a schedule as text, as a picture or as a Chrome trace."""

from __future__ import annotations

from collections.abc import Mapping
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
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.draw.chrome import chrome_trace
from paci_schedule.draw.picture import picture
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.execute import simulate
from paci_schedule.simulate.figures import figures_of

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
    drawn = {
        f"{job[0].name}, {job[1].stages} stages, {job[1].accumulation} micro-batches": job for job in jobs(options)
    }
    timelines = {title: simulate(*job, batches) for title, job in drawn.items()}
    if output:
        picture(timelines, output, captions=_captions(drawn))
    if as_json:
        print_json(chrome_trace(timelines))
    elif not output:
        console = screen()
        for title, timeline in timelines.items():
            if len(timelines) > 1:
                console.print(title)
            print_grid(console, timeline, width)


def _captions(drawn: Mapping[str, tuple[Schedule, PipelineSpec, Costs]]) -> dict[str, tuple[str, str]]:
    """For each title what its schedule waits, where 1F1B is drawn as well how much faster it is in a long run, and what
    its longest wait is."""
    found = {title: figures_of(*job) for title, job in drawn.items()}
    flush = [found[title].time_per_micro_batch for title, (schedule, *_) in drawn.items() if schedule.name == "1f1b"]
    captions = {}
    for title, (schedule, *_) in drawn.items():
        share, seconds = found[title].bubble_share, found[title].time_per_micro_batch
        said = f"bubble {share:.0%} of the time" if share else "no bubble in a long run"
        if flush and schedule.name != "1f1b":
            said += f", {flush[0] / seconds:.3g} times the speed of 1F1B"
        captions[title] = said, "bubble" if share else "fill"
    return captions

"""`paci trace`: show where the time of a recorded run went, and a simulated run beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich.table import Table

from paci_schedule import trace
from paci_schedule.cli.options import json_option, output_option, width_option
from paci_schedule.cli.printing import print_grid, print_json, screen
from paci_schedule.draw.picture import picture
from paci_schedule.errors import ConfigError

__all__ = ["trace_"]


@click.command("trace")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="FILE...")
@click.option(
    "--batches",
    type=click.IntRange(1),
    default=3,
    metavar="N",
    help="Number of batches to draw, the last ones (default 3); a .json file holds the whole run.",
)
@width_option
@output_option
@json_option
def trace_(files: Sequence[Path], batches: int, width: int | None, output: Path | None, as_json: bool) -> None:
    """Say where the time of a recorded run went.

    Name one FILE for each stage, or the folder that holds them; a simulated run is drawn beside the recorded one.
    """
    paths = [path for file in files for path in (sorted(file.glob("*.jsonl")) if file.is_dir() else [file])]
    if not paths:
        raise ConfigError("no trace files: name the files (or the folder of *.jsonl files) that the ranks wrote")
    recordings = trace.merge([trace.read(path) for path in paths])
    recorded, expected = trace.timeline(recordings), trace.simulated(recordings)
    spent = [trace.spent(recording) for recording in recordings]
    accumulation = recordings[0].accumulation
    drawn = {"recorded": recorded, "simulated": expected}
    if output is None or output.suffix != ".json":
        drawn = {title: trace.last_batches(whole, accumulation, batches) for title, whole in drawn.items()}
    if output:
        picture(drawn, output, unit="s")
    if as_json:
        print_json(
            {
                "stages": len(recordings),
                "accumulation": accumulation,
                "makespan": recorded.makespan,
                "simulated_makespan": expected.makespan,
                "spent": spent,
            }
        )
        return
    table = Table("stage", *spent[0], title="Where the time went (s)", box=None, title_justify="left")
    for stage, times in enumerate(spent):
        total = sum(times.values()) or 1.0
        table.add_row(str(stage), *(f"{seconds:.3f} ({seconds / total:4.0%})" for seconds in times.values()))
    console = screen()
    console.print(table)
    console.print(
        f"recorded {recorded.makespan:.3f} s, simulated with the medians of its ops {expected.makespan:.3f} s"
    )
    if output is None:
        for title, timeline in drawn.items():
            console.print(f"{title}, its last {timeline.makespan:.3f} s (--batches {batches})")
            print_grid(console, timeline, width or console.width)

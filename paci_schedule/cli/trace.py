"""`paci trace`: say where the time of a recorded run went and what cost it, and show a simulated run beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from paci_schedule import trace
from paci_schedule.cli.options import json_option, width_option
from paci_schedule.cli.page import is_page, write_page
from paci_schedule.cli.printing import print_grid, print_json, screen
from paci_schedule.core.files import read_json
from paci_schedule.draw.chrome import chrome_trace
from paci_schedule.draw.picture import picture
from paci_schedule.errors import ConfigError
from paci_schedule.simulate.timeline import Timeline

__all__ = ["trace_"]

_LARGEST = 1 << 24  # bytes of a plan


@click.command("trace")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="FILE...")
@click.option(
    "--against",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="PLAN",
    help="Compare with the plan in this file, which `paci plan --json` printed.",
)
@click.option(
    "--batches",
    type=click.IntRange(1),
    default=3,
    metavar="N",
    help="Number of batches to draw, the last ones (default 3); a .json file holds the whole run.",
)
@width_option
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a picture: .svg, .png, .txt, .json for a Chrome trace (ui.perfetto.dev), or .html for a page.",
)
@click.option(
    "--follow",
    type=click.FloatRange(0.1),
    metavar="SECONDS",
    help="Write the .html page of a run that goes on, again and again, until you press Ctrl-C.",
)
@json_option
def trace_(
    files: Sequence[Path],
    against: Path | None,
    batches: int,
    width: int | None,
    output: Path | None,
    follow: float | None,
    as_json: bool,
) -> None:
    """Say where the time of a recorded run went, and what cost it.

    Name one FILE for each stage, or the folder that holds them; a simulated run is drawn beside the recorded one.
    """
    if is_page(output) or follow is not None:
        write_page(files, output, batches, follow)
        return
    recordings = read_run(files)
    recorded, expected = trace.timeline(recordings), trace.simulated(recordings)
    drawn = {"recorded": recorded, "simulated": expected}
    _write(output, drawn, recordings, batches)
    found = {
        "stages": len(recordings),
        "accumulation": recordings[0].accumulation,
        "makespan": recorded.makespan,
        "simulated_makespan": expected.makespan,
        "ideal_makespan": trace.ideal_seconds(recordings),
        "seconds_per_micro_batch": trace.seconds_per_micro_batch(recordings),
        "stage_seconds": trace.stage_seconds(recordings),
        "spent": [trace.spent(recording) for recording in recordings],
    }
    verdicts = trace.verdicts(recordings)
    planned = _planned(against, found) if against else []
    if as_json:
        print_json({**found, "verdicts": [asdict(verdict) for verdict in verdicts], "against": planned or None})
        return
    console = screen()
    console.print(_spent(found["spent"]))
    console.print(
        f"recorded {recorded.makespan:.3f} s, simulated with the medians of its ops {expected.makespan:.3f} s, ideal "
        f"(equal stages that never wait) {found['ideal_makespan']:.3f} s"
    )
    for line in [str(verdict) for verdict in verdicts] or ["No stage, link, jitter or data costs 1% of the run."]:
        console.print(line, soft_wrap=True)
    for line in planned:
        console.print(line, soft_wrap=True)
    if output is None:
        for title, timeline in drawn.items():
            timeline = trace.last_batches(timeline, recordings[0].accumulation, batches)
            console.print(f"{title}, its last {timeline.makespan:.3f} s (--batches {batches})")
            print_grid(console, timeline, width or console.width)


def read_run(files: Sequence[Path]) -> list[trace.Recording]:
    """The recordings of a run, on one clock; `files` may name the folder that holds them."""
    files = [file for file in files if not trace.holds_figures(file)]
    paths = [path for file in files for path in (sorted(file.glob("*.jsonl")) if file.is_dir() else [file])]
    if not paths:
        raise ConfigError("no trace files: name the files (or the folder of *.jsonl files) that the ranks wrote")
    return trace.merge([trace.read(path) for path in paths])


def _write(
    output: Path | None, drawn: dict[str, Timeline], recordings: Sequence[trace.Recording], batches: int
) -> None:
    """Write the picture of the last batches, or the Chrome trace of the whole run with its waits, data and messages."""
    if output is None:
        return
    if output.suffix != ".json":
        accumulation = recordings[0].accumulation
        last = {title: trace.last_batches(whole, accumulation, batches) for title, whole in drawn.items()}
        picture(last, output, unit="s")
        return
    notes = {"recorded": trace.between_ops(recordings)}
    try:
        output.write_text(json.dumps(chrome_trace(drawn, notes)))
    except OSError as error:
        raise ConfigError(f"output={str(output)!r}: cannot be written ({error}); name another file") from None


def _spent(spent: Sequence[dict[str, float]]) -> Table:
    table = Table("stage", *spent[0], title="Where the time went (s)", box=None, title_justify="left")
    for stage, times in enumerate(spent):
        total = sum(times.values()) or 1.0
        table.add_row(str(stage), *(f"{seconds:.3f} ({seconds / total:4.0%})" for seconds in times.values()))
    return table


def _planned(path: Path, found: dict[str, Any]) -> list[str]:
    """Lines that compare the run with the row of a plan for DeepSpeed, or else for Megatron."""
    try:
        settings = read_json(path, _LARGEST)["settings"]
        row = next(each["row"] for each in settings.values() if each.get("row"))
        stages, seconds, works = row["stages"], float(row["seconds_per_micro_batch"]), row["stage_seconds"]
        accumulation = row["accumulation"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ConfigError(
            f"against={str(path)!r}: holds no plan that can run ({type(error).__name__}: {error}); write it with paci "
            "plan --json"
        ) from None
    if (stages, accumulation) != (found["stages"], found["accumulation"]):
        raise ConfigError(
            f"against={str(path)!r}: the plan has {stages} stages and {accumulation} micro-batches an update, the run "
            f"{found['stages']} and {found['accumulation']}; name the plan of this run"
        )
    lines = [_against("a micro-batch", seconds, found["seconds_per_micro_batch"])]
    for stage, (planned, recorded) in enumerate(zip(works, found["stage_seconds"], strict=True)):
        lines.append(_against(f"stage {stage}", planned, recorded))
    return lines


def _against(what: str, planned: float, recorded: float) -> str:
    more = f" ({recorded / planned - 1:+.1%})" if planned else ""
    return f"{what}: planned {planned:.4g} s, recorded {recorded:.4g} s{more}"

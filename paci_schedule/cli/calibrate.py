"""`paci calibrate`: the costs of a recorded run, as `paci simulate` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from paci_schedule import trace
from paci_schedule.cli.options import json_option
from paci_schedule.cli.printing import print_json
from paci_schedule.cli.trace import read_run
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.simulate.figures import time_per_micro_batch

__all__ = ["calibrate"]

_COSTS = "forward", "backward", "weight", "step", "latency", "jitter"


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="FILE...")
@click.option(
    "--schedule", "name", default="paci", metavar="NAME", help="The schedule that was recorded (default paci)."
)
@json_option
def calibrate(files: Sequence[Path], name: str, as_json: bool) -> None:
    """Take the costs of ops and links from a recorded run.

    Name one FILE for each stage, or the folder that holds them.  The options that are printed are those of `paci
    simulate`, which can then say what another schedule, slack or more micro-batches would do for this job.
    """
    recordings = read_run(files)
    costs = trace.recorded_costs(recordings)
    spec = PipelineSpec(stages=len(recordings), accumulation=recordings[0].accumulation)
    recorded = trace.seconds_per_micro_batch(recordings)
    simulated = time_per_micro_batch(schedule(name), spec, costs)
    found = {key: value for key in _COSTS if (value := getattr(costs, key))}
    if as_json:
        print_json({**found, "recorded": recorded, "simulated": simulated})
        return
    listed = " ".join(f"--{key} {_listed(value)}" for key, value in found.items())
    click.echo(
        f"--schedule {name} --stages {spec.stages} --micro-batches {spec.accumulation} {listed}\n"
        f"a micro-batch: simulated {simulated:.4g} s, recorded {recorded:.4g} s ({simulated / recorded - 1:+.1%})"
    )


def _listed(value: float | Sequence[float]) -> str:
    """One number, or the numbers of all stages, as an option takes them."""
    return ",".join(f"{each:.6g}" for each in (value if isinstance(value, Sequence) else [value]))

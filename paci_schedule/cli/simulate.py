"""`paci simulate`: print the figures of a schedule, or of several side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.table import Table

from paci_schedule.cli.options import costs_options, jobs, json_option, pipeline_options, slack_option
from paci_schedule.cli.printing import print_json, screen
from paci_schedule.simulate.figures import figures_of

__all__ = ["simulate_"]


@click.command("simulate")
@pipeline_options
@costs_options
@slack_option
@click.option(
    "--batches",
    type=int,
    metavar="N",
    help="Number of batches for makespan, peaks and drift (default: one batch, and the steady state).",
)
@click.option(
    "--activation-bytes", type=float, default=0.0, metavar="BYTES", help="Activations of one micro-batch on one stage."
)
@click.option("--weight-bytes", type=float, default=0.0, metavar="BYTES", help="Weights of one stage.")
@json_option
def simulate_(batches: int | None, activation_bytes: float, weight_bytes: float, as_json: bool, **options: Any) -> None:
    """Simulate a schedule and print its figures.  Times are in the unit of --forward and --backward."""
    found = []
    for chosen, spec, costs in jobs(options):
        figures = figures_of(chosen, spec, costs, batches, activation_bytes=activation_bytes, weight_bytes=weight_bytes)
        shape = {"schedule": chosen.name, "stages": spec.stages, "micro_batches": spec.accumulation, "batches": batches}
        shape |= {"extra_in_flight": spec.extra_in_flight}
        found.append(shape | asdict(figures))
    if as_json:
        print_json(found if len(found) > 1 else found[0])
    else:
        screen().print(_comparison(found) if len(found) > 1 else _figures(found[0]))


def _figures(found: dict[str, Any]) -> Table:
    """The figures of one schedule."""
    title = f"{found['schedule']}, {found['stages']} stages, {found['micro_batches']} micro-batches"
    table = Table(title=title, show_header=False, box=None, title_justify="left")
    for key, value in found.items():
        if key not in ("schedule", "stages", "micro_batches", "batches", "counted_batches") and (
            (not isinstance(value, list) or any(value)) and (key != "extra_in_flight" or value)
        ):
            table.add_row(key.replace("_", " "), _brief(value))
    return table


def _comparison(rows: Sequence[dict[str, Any]]) -> Table:
    """The main figures of several schedules; `speed` is relative to the first."""
    table = Table(
        "schedule", "time per micro-batch", "speed", "bubble", "bubble share", "in flight", "drift", "weights", box=None
    )
    for row in rows:
        times = [each["time_per_micro_batch"] for each in (rows[0], row)]
        speed = f"{times[0] / times[1]:.3f}" if times[1] else ""
        figures = f"{times[1]:.6g}", speed, f"{row['bubble']:.6g}", f"{row['bubble_share']:.1%}"
        most = (f"{max(row[key]):g}" for key in ("peak_in_flight", "max_drift", "weight_versions"))
        table.add_row(row["schedule"], *figures, *most)
    return table


def _brief(value: Any) -> str:
    """A figure for a table; for many stages only the first, the last and the largest value."""
    if isinstance(value, tuple):  # of each link, as the option takes it
        return ",".join(map(str, value))
    if isinstance(value, list) and isinstance(value[0], dict):
        return _brief(dict(sum((Counter(each) for each in value), Counter()))) + " over all stages"
    if isinstance(value, list):
        if len(value) > 1 and max(value) - min(value) <= 1e-9 * abs(max(value)):
            return f"{_brief(value[0])} on every stage"
        if len(value) > 16:
            return f"{_brief(value[0])} ... {_brief(value[-1])}, at most {_brief(max(value))}"
        return "  ".join(_brief(each) for each in value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {count}" for key, count in sorted(value.items())) + "}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)

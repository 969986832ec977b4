"""Compare runs of launch/train_gpt.py: a table, and a plot of the loss against tokens and against wall-clock.

    python launch/compare.py runs/flush runs/paci

The first run is the baseline that the others' speed-up is measured against.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.errors import LaunchError
from launch.runlog import LOG_NAME, read_log

__all__ = ["RunSummary", "comparison", "ideal_speed_up", "main", "plot", "speed_ups", "summarise"]

_NAMES = {"1f1b": "1F1B with flush", "paci": "PACI"}


@dataclass(frozen=True)
class RunSummary:
    """What the log of one finished run says."""

    name: str
    """The schedule, for a reader."""

    start: dict[str, Any]
    """The facts at the start: stages, accumulation, ..."""

    updates: list[dict[str, Any]]
    """The records of training, with update, tokens, seconds (training only) and loss."""

    validations: list[dict[str, Any]]
    """The records of validation, with tokens, seconds and loss."""

    stages: list[dict[str, Any]]
    """The facts at the end, one a rank, first stage first."""

    @property
    def update_seconds(self) -> float:
        """Seconds per update: the median over the log's intervals, so that a hiccup of the machine does not count.

        Raises:
            LaunchError: the log has fewer than two records of training.
        """
        if len(self.updates) < 2:
            raise LaunchError(f"{self.name}: a speed needs two records of training; train longer or log more often")
        return statistics.median(
            (after["seconds"] - before["seconds"]) / (after["update"] - before["update"])
            for before, after in pairwise(self.updates)
        )

    @property
    def waiting_share(self) -> float | None:
        """Share of the stages' time spent waiting for a neighbour; None where the engine does not count it."""
        if "wait_seconds" not in self.stages[0]:
            return None
        waited = sum(stage["wait_seconds"] for stage in self.stages)
        return waited / (waited + sum(stage["compute_seconds"] for stage in self.stages))

    def seconds_to(self, loss: float) -> float | None:
        """Training seconds until the validation loss was first at most `loss`, on a line between records."""
        before = None
        for record in self.validations:
            if record["loss"] <= loss:
                if before is None:
                    return record["seconds"]
                share = (before["loss"] - loss) / (before["loss"] - record["loss"])
                return before["seconds"] + share * (record["seconds"] - before["seconds"])
            before = record
        return None


def summarise(folder: Path) -> RunSummary:
    """Read the log in `folder`.

    Raises:
        LaunchError: there is no log, or the run did not get to its end.
    """
    records = read_log(folder / LOG_NAME)
    by_event: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_event.setdefault(record["event"], []).append(record)
    missing = {"start", "update", "validation", "end"} - set(by_event)
    if missing:
        raise LaunchError(f"log in {str(folder)!r}: has no record of {', '.join(sorted(missing))}; has the run ended?")
    start, end = by_event["start"][0], by_event["end"][-1]
    stages = sorted(end["stages"], key=lambda stage: (stage["stage"], stage["replica"]))
    name = _NAMES.get(start["schedule"], start["schedule"])
    return RunSummary(name, start, by_event["update"], by_event["validation"], stages)


def ideal_speed_up(stages: int, accumulation: int) -> float:
    """What removing the bubble of a flush gives at best, with equal stages: (a + P - 1) / a."""
    return (accumulation + stages - 1) / accumulation


def speed_ups(runs: Sequence[RunSummary]) -> list[float]:
    """How many times faster than the first run an update of each other run is."""
    return [runs[0].update_seconds / run.update_seconds for run in runs[1:]]


def comparison(runs: Sequence[RunSummary]) -> list[tuple[str, list[str]]]:
    """The rows of the table: a label, and a cell for every run.  The first run is the baseline."""
    target = runs[0].validations[-1]["loss"]
    memory = "GPU memory" if runs[0].start["device"] == "cuda" else "process memory"
    return [
        ("optimizer", [run.start["optimizer"] for run in runs]),
        ("prediction", [_prediction(run) or "" for run in runs]),
        ("stages x replicas", [f"{run.start['stages']} x {run.start['replicas']}" for run in runs]),
        ("accumulation", [str(run.start["accumulation"]) for run in runs]),
        ("updates", [f"{run.updates[-1]['update']:,}" for run in runs]),
        ("tokens", [f"{run.updates[-1]['tokens']:,}" for run in runs]),
        ("training time", [f"{run.updates[-1]['seconds']:.1f} s" for run in runs]),
        ("an update, median", [f"{run.update_seconds * 1000:.1f} ms" for run in runs]),
        ("speed-up", ["1", *(f"{ratio:.3f}" for ratio in speed_ups(runs))]),
        ("ideal, (a + P - 1) / a", ["", *(f"{_ideal(run):.3f}" for run in runs[1:])]),
        ("training loss", [f"{run.updates[-1]['loss']:.4f}" for run in runs]),
        ("validation loss", [f"{run.validations[-1]['loss']:.4f}" for run in runs]),
        ("perplexity", [f"{run.validations[-1]['perplexity']:.3f}" for run in runs]),
        (f"time to loss {target:.4f}", [_seconds(run.seconds_to(target)) for run in runs]),
        ("drift (bound)", [_drift(run) for run in runs]),
        ("waiting", [_waiting(run) for run in runs]),
        (f"{memory}, first", [f"{run.stages[0]['peak_memory'] / 2**20:,.0f} MiB" for run in runs]),
        (f"{memory}, last", [f"{run.stages[-1]['peak_memory'] / 2**20:,.0f} MiB" for run in runs]),
    ]


def plot(runs: Sequence[RunSummary], path: Path) -> None:
    """Write the loss against tokens and against wall-clock as a PNG: training as a line, validation as dots."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, run in enumerate(runs):
        colour = f"C{number}"
        for axis, key, scale in zip(axes, ("tokens", "seconds"), (1e-6, 1), strict=True):
            x, y = _line(run.updates, key, scale)
            axis.plot(x, y, color=colour, alpha=0.35, linewidth=1)
            x, y = _line(run.validations, key, scale)
            label = f"{run.name}, {run.start['optimizer']}"
            if _prediction(run) not in (None, "off"):
                label += ", predicted weights"
            axis.plot(x, y, color=colour, marker="o", markersize=3.5, label=label)
    axes[0].set(xlabel="tokens (millions)", ylabel="loss (nats per token)", title="the same tokens")
    axes[1].set(xlabel="training time (seconds)", title="the same wall-clock")
    # The first updates, from ln(vocabulary) down, would squeeze the part that is worth a look.
    shown = [record["loss"] for run in runs for record in (*run.updates[1:], *run.validations)]
    low, high = min(shown), statistics.quantiles(shown, n=20)[-1] if len(shown) > 1 else shown[0]
    axes[0].set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low) + 1e-6)
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend(title="line: training, dots: validation")
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """Print the table and write the plot for the run folders on the command line."""
    parser = argparse.ArgumentParser(prog="compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, the baseline first")
    parser.add_argument("--plot", type=Path, help="PNG to write [loss.png beside the baseline's folder]")
    args = parser.parse_args(arguments)
    try:
        runs = [summarise(folder) for folder in args.runs]
        rows = comparison(runs)
    except LaunchError as error:
        parser.exit(2, f"compare: error: {error}\n")
    path = args.plot or args.runs[0].resolve().parent / "loss.png"
    plot(runs, path)

    start = runs[0].start
    table = Table(title=f"GPT-2 {start['model']}, {start['parameters'] / 1e6:.1f}M parameters, on {start['data']}")
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    for label, cells in rows:
        table.add_row(label, *cells)
    console = Console()
    console.print(table)
    if any(ratio > 1.03 * _ideal(run) for ratio, run in zip(speed_ups(runs), runs[1:], strict=True)):
        console.print("A speed-up above the ideal: the machine was busy with something else. Repeat when it is idle.")
    console.print(f"Plot: {path}", soft_wrap=True)


def _line(records: list[dict[str, Any]], key: str, scale: float) -> tuple[list[float], list[float]]:
    return [record[key] * scale for record in records], [record["loss"] for record in records]


def _ideal(run: RunSummary) -> float:
    return ideal_speed_up(run.start["stages"], run.start["accumulation"])


def _prediction(run: RunSummary) -> str | None:
    """Which stale forwards ran on predicted weights, and how far along the update these were; None without any."""
    prediction, reach = run.start.get("prediction"), run.start.get("prediction_reach", 1.0)
    return prediction if prediction is None or reach == 1 else f"{prediction}, reach {reach:g}"


def _seconds(seconds: float | None) -> str:
    return "not reached" if seconds is None else f"{seconds:.1f} s"


def _drift(run: RunSummary) -> str:
    if "max_drift" not in run.stages[0]:
        return "none"
    drift, bound = (max(stage[name] for stage in run.stages) for name in ("max_drift", "drift_bound"))
    return f"{drift} ({bound})"


def _waiting(run: RunSummary) -> str:
    return "not counted" if run.waiting_share is None else f"{run.waiting_share:.1%}"


if __name__ == "__main__":
    main()

"""Stock 1F1B against PACI on paced stages: forwards and backwards take fixed times, so any machine shows the schedule.

    python -m benchmarks.paced                                     # the table in docs/results.md
    python -m benchmarks.paced --stages 8 --accumulation 8 --forward 40 --backward 80

Both engines run in the same processes, in turns, after a warm-up; the median batch counts.  The ideal ratio stock/PACI
is (a + P - 1) / a: what a flushed batch takes, against a batch without any bubble.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from rich.console import Console
from rich.table import Table

from benchmarks.engines import SCHEDULES, Race, engine_for, milliseconds, race
from integration_tests.ranks import run_ranks


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of the table; times in seconds."""

    stages: int
    accumulation: int
    forward: float
    backward: float
    batches: int
    turns: int


class _Pace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradient, None, None


class PacedLayer(torch.nn.Module):
    """A stage whose forward and backward take a fixed time, in seconds."""

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))
        self.seconds = forward, backward

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return _Pace.apply(values * self.weight, *self.seconds)


def build(job: Job, schedule: str) -> Any:
    """A DeepSpeed engine over `job.stages` paced stages."""
    layers = [LayerSpec(PacedLayer, job.forward, job.backward) for _ in range(job.stages)]
    return engine_for(layers, schedule, accumulation=job.accumulation)


def _worker(job: Job) -> Race:
    engines = {schedule: build(job, schedule) for schedule in SCHEDULES}
    data = itertools.repeat((torch.ones(1, 8), torch.zeros(1, 8)))
    return race(engines, data, turns=job.turns, batches=job.batches)


def measure(job: Job) -> dict[str, Any]:
    """Run one job and sum it up: median milliseconds per micro-batch of both schedules, their ratio and the ideal."""
    deadline = 90 + 3 * job.turns * (job.batches + 4) * (job.accumulation + job.stages) * (job.forward + job.backward)
    races: list[Race] = run_ranks(_worker, job.stages, (job,), timeout=deadline)
    medians = milliseconds(races, job.accumulation)
    ideal = (job.accumulation + job.stages - 1) / job.accumulation
    ratio = medians["1f1b"] / medians["paci"]
    return {
        **asdict(job),
        "milliseconds": medians,
        "ratio": ratio,
        "ideal": ideal,
        "of_ideal": ratio / ideal,
        "compute_share": [seen.compute_share for seen in races],
        **{key: [seen.stats[key] for seen in races] for key in ("peak_in_flight", "max_drift", "drift_bound")},
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    head = ("P", "a", "F / B ms", "1F1B ms", "PACI ms", "ratio", "ideal", "of ideal", "least compute share", "drift")
    shown = Table(*head, title="milliseconds per micro-batch, median")
    for row in rows:
        shown.add_row(
            str(row["stages"]),
            str(row["accumulation"]),
            f"{row['forward'] * 1e3:g} / {row['backward'] * 1e3:g}",
            f"{row['milliseconds']['1f1b']:.1f}",
            f"{row['milliseconds']['paci']:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['ideal']:.3f}",
            f"{row['of_ideal']:.3f}",
            f"{min(row['compute_share']):.3f}",
            f"{max(row['max_drift'])} of {max(row['drift_bound'])}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--accumulation", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--forward", type=float, default=40.0, help="milliseconds")
    parser.add_argument("--backward", type=float, default=80.0, help="milliseconds")
    parser.add_argument("--batches", type=int, default=4, help="batches in a turn")
    parser.add_argument("--turns", type=int, default=2, help="turns of each schedule")
    parser.add_argument("--json", help="file to write the rows to")
    arguments = parser.parse_args()
    rows = []
    for stages in arguments.stages:
        for accumulation in arguments.accumulation:
            job = Job(
                stages=stages,
                accumulation=accumulation,
                forward=arguments.forward / 1e3,
                backward=arguments.backward / 1e3,
                batches=arguments.batches,
                turns=arguments.turns,
            )
            rows.append(measure(job))
            Console().print(table(rows[-1:]))
    Console().print(table(rows))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()

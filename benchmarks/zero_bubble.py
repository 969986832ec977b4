"""ZB-H1 on paced stages, beside torch.distributed.pipelining's own zero-bubble schedule, 1F1B, GPipe and PACI.

    python -m benchmarks.zero_bubble                                            # P = 4 and 8, a = 2 P

F, B (the gradients of a stage's inputs) and W (those of its weights) take fixed times, so any machine shows the
schedules.  All run in the same processes, in turns, after a warm-up; the median batch counts.  In units of a batch of a
micro-batches the ideal is a (F + B + W) and a bubble of (P - 1) (F + B + W) for 1F1B and GPipe,
(P - 1) (B + max(0, F - W)) for ZB-H1, and none for PACI.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed import pipelining

from benchmarks.engines import Race, engine_for, milliseconds, race
from benchmarks.pacing import Pace
from testing.ranks import run_ranks

OURS = {"1F1B, DeepSpeed": "1f1b", "GPipe": "gpipe", "ZB-H1": "zb-h1", "PACI": "paci"}
THEIRS = {"1F1B, torch": "Schedule1F1B", "ZB-H1, torch": "ScheduleInterleavedZeroBubble"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One table; times in seconds."""

    stages: int
    accumulation: int
    forward: float
    backward: float
    weight: float
    batches: int
    turns: int

    def ideal(self, engine: str) -> float:
        """Seconds of one batch without overhead."""
        work = self.forward + self.backward + self.weight
        bubble = self.backward + max(0.0, self.forward - self.weight) if engine.startswith("ZB-H1") else work
        return self.accumulation * work + (self.stages - 1) * bubble * (engine != "PACI")


class SplitLayer(nn.Module):
    """A stage whose forward, gradient of inputs and gradient of weights take fixed times, in seconds."""

    def __init__(self, forward: float, backward: float, weight: float) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.seconds = forward, backward, weight

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        forward, backward, weight = self.seconds
        return Pace.apply(values * self.first, forward, backward) * Pace.apply(self.second, 0.0, weight)


class TorchPipeline:
    """A pipeline of torch.distributed.pipelining over all ranks, with what `race` calls."""

    def __init__(self, job: Comparison, schedule: str) -> None:
        self._rank, self._job = torch.distributed.get_rank(), job
        layer = SplitLayer(job.forward, job.backward, job.weight)
        self._optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        stage = pipelining.PipelineStage(layer, self._rank, job.stages, torch.device("cpu"))
        kind = getattr(pipelining, schedule)
        stages = stage if issubclass(kind, pipelining.schedules.PipelineScheduleSingle) else [stage]
        self._schedule = kind(stages, job.accumulation, loss_fn=nn.MSELoss())

    def train_batch(self, data: Iterator[Any]) -> None:
        inputs, labels = zip(*itertools.islice(data, self._job.accumulation), strict=True)
        last = self._rank == self._job.stages - 1
        self._schedule.step(
            *([torch.cat(inputs)] if not self._rank else []), target=torch.cat(labels) if last else None
        )
        self._optimizer.step()
        self._optimizer.zero_grad()


def _worker(job: Comparison) -> Race:
    pace = job.forward, job.backward, job.weight
    engines: dict[str, Any] = {}
    for name, schedule in OURS.items():
        layers = [LayerSpec(SplitLayer, *pace) for _ in range(job.stages)]
        engines[name] = engine_for(layers, schedule, accumulation=job.accumulation)
    engines |= {name: TorchPipeline(job, schedule) for name, schedule in THEIRS.items()}
    data = itertools.repeat((torch.ones(1, 8), torch.zeros(1, 8)))
    return race(engines, data, turns=job.turns, batches=job.batches)


def measure(job: Comparison) -> list[dict[str, Any]]:
    """Run one job: for each engine the median milliseconds per micro-batch, beside the ideal."""
    count = len(OURS | THEIRS) * (3 + job.turns * (job.batches + 1))
    races: list[Race] = run_ranks(_worker, job.stages, (job,), timeout=120 + 2 * count * job.ideal("1F1B"))
    rows = []
    for name, median in milliseconds(races, job.accumulation).items():
        ideal = 1e3 * job.ideal(name) / job.accumulation
        rows.append({**asdict(job), "engine": name, "milliseconds": median, "ideal": ideal})
    for row in rows:
        row["speed_up"] = rows[0]["milliseconds"] / row["milliseconds"]
        row["ideal_speed_up"] = rows[0]["ideal"] / row["ideal"]
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    shown = Table(
        *("P", "a", "engine", "ms", "ideal", "speed-up", "ideal"), title="milliseconds per micro-batch, median"
    )
    for row in rows:
        numbers = (row[key] for key in ("milliseconds", "ideal", "speed_up", "ideal_speed_up"))
        shown.add_row(str(row["stages"]), str(row["accumulation"]), row["engine"], *(f"{each:.3f}" for each in numbers))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--accumulation", type=int, nargs="+", help="micro-batches of a batch (2 P)")
    for name in ("forward", "backward", "weight"):
        parser.add_argument(f"--{name}", type=float, default=30.0, help="milliseconds")
    parser.add_argument("--batches", type=int, default=4, help="batches in a turn")
    parser.add_argument("--turns", type=int, default=2, help="turns of each engine")
    parser.add_argument("--json", help="file to write the rows to")
    arguments = parser.parse_args()
    rows = []
    for stages in arguments.stages:
        for accumulation in arguments.accumulation or [2 * stages]:
            job = Comparison(
                stages=stages,
                accumulation=accumulation,
                forward=arguments.forward / 1e3,
                backward=arguments.backward / 1e3,
                weight=arguments.weight / 1e3,
                batches=arguments.batches,
                turns=arguments.turns,
            )
            rows += measure(job)
    Console().print(table(rows))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()

"""`SchedulePaci` against the schedules of torch.distributed.pipelining on paced stages: efficiency and activations.

    python -m benchmarks.torch_schedules                                       # P = 8, a = 8 and 16

All schedules train the same job in the same processes, in turns, after a warm-up; the median batch counts.  Schedules
of two chunks a rank have chunks of half the time, and those that split the backward spend half of it on the weights.
DualPipeV wants 2 P micro-batches.  Efficiency is F + B over the time that a micro-batch takes.  Activations are
counted: the most forwards, in stages, whose backward was not done, on any rank.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage

from benchmarks.engines import Race, milliseconds
from benchmarks.pacing import Pacing, add_pacing, pacing_of
from paci_schedule.adapters.torch import SchedulePaci
from testing.ranks import run_ranks

IN_TWO_CHUNKS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "ScheduleInterleavedZeroBubble": lambda stages, rank: (rank, stages + rank),
    "ScheduleZBVZeroBubble": lambda stages, rank: (rank, 2 * stages - 1 - rank),
    "ScheduleDualPipeV": lambda stages, rank: (rank, 2 * stages - 1 - rank),
}
"""Torch's schedules, and which chunks of the model a rank has."""


def names(job: Pacing) -> list[str]:
    """The schedules that there are for a job."""
    fitting = [name for name in IN_TWO_CHUNKS if name != "ScheduleDualPipeV" or job.accumulation >= 2 * job.stages]
    return ["Schedule1F1B", *fitting, "SchedulePaci"]


class Meter:
    """How many activations a rank holds, in stages."""

    def __init__(self) -> None:
        self.held = self.peak = 0.0

    def add(self, part: float) -> None:
        self.held += part
        self.peak = max(self.peak, self.held)


class Pace(torch.autograd.Function):
    """The identity, in `forward` seconds; its gradient, in `backward` seconds."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        ctx.chunk = chunk
        time.sleep(chunk.forward_seconds)
        chunk.meter.add(chunk.part)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        chunk = ctx.chunk
        time.sleep(chunk.backward_seconds / (2 if chunk.splits else 1))
        if not chunk.splits:
            chunk.meter.add(-chunk.part)
        return gradient, None


class Chunk(torch.nn.Module):
    """A part of a stage, whose ops take a fixed time."""

    def __init__(self, job: Pacing, part: float, splits: bool, meter: Meter) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))
        self.part, self.splits, self.meter = part, splits, meter
        self.forward_seconds, self.backward_seconds = job.forward * part, job.backward * part

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return Pace.apply(values * self.weight, self)

    def weights_builder(self) -> Callable[[], None]:
        """What torch calls for the second half of a backward."""

        def run() -> None:
            time.sleep(self.backward_seconds / 2)
            self.meter.add(-self.part)

        return run


def build(job: Pacing, name: str, meter: Meter) -> Callable[[], None]:
    """What trains one batch under a schedule."""
    rank, two = dist.get_rank(), name in IN_TWO_CHUNKS
    numbers = IN_TWO_CHUNKS[name](job.stages, rank) if two else (rank,)
    total = job.stages * len(numbers)
    chunks = [Chunk(job, 1 / len(numbers), two, meter) for _ in numbers]
    stages = [
        PipelineStage(
            chunk,
            number,
            total,
            torch.device("cpu"),
            input_args=torch.ones(1, 8, requires_grad=number > 0),  # so that torch runs nothing to find the shapes
            output_args=torch.ones(1, 8, requires_grad=True),
            dw_builder=chunk.weights_builder if two else None,
        )
        for number, chunk in zip(numbers, chunks, strict=True)
    ]
    optimizer = torch.optim.SGD([chunk.weight for chunk in chunks], lr=1e-3)
    loss_fn = torch.nn.MSELoss()
    schedule: Any
    if name == "SchedulePaci":
        schedule = SchedulePaci(stages[0], job.accumulation, loss_fn, optimizers=optimizer)
    else:
        schedule = getattr(pipelining, name)(stages if two else stages[0], job.accumulation, loss_fn)
    inputs, target = torch.ones(job.accumulation, 8), torch.zeros(job.accumulation, 8)

    def train() -> None:
        args = [inputs] if 0 in numbers else []
        schedule.step(*args, target=target if total - 1 in numbers else None, return_outputs=False)
        if name != "SchedulePaci":
            optimizer.step()
            optimizer.zero_grad()

    return train


def _worker(job: Pacing) -> tuple[Race, dict[str, float]]:
    meters = {name: Meter() for name in names(job)}
    schedules = {name: build(job, name, meters[name]) for name in names(job)}
    seen = Race()
    for train in schedules.values():
        for _ in range(2):
            train()
    for _ in range(job.turns):
        for name, train in schedules.items():
            dist.barrier()
            train()
            for _ in range(job.batches):
                begin = time.perf_counter()
                train()
                seen.seconds[name].append(time.perf_counter() - begin)
    seen.seconds = dict(seen.seconds)
    return seen, {name: meter.peak for name, meter in meters.items()}


def measure(job: Pacing) -> list[dict[str, Any]]:
    """A row for each schedule: its name, milliseconds a micro-batch, efficiency, and activations in stages."""
    batches = len(names(job)) * (2 + job.turns * (job.batches + 1))
    slot = job.forward + job.backward
    timeout = 120 + 2 * batches * (job.accumulation + job.stages) * slot
    races, peaks = zip(*run_ranks(_worker, job.stages, (job,), timeout=timeout), strict=True)
    medians = milliseconds(list(races), job.accumulation)
    return [
        {
            "stages": job.stages,
            "accumulation": job.accumulation,
            "schedule": name,
            "milliseconds": median,
            "efficiency": 1e3 * slot / median,
            "speed_up": medians["Schedule1F1B"] / median,
            "activations": max(peak[name] for peak in peaks),
        }
        for name, median in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[8, 16])
    add_pacing(parser)
    arguments = parser.parse_args()
    rows = []
    for accumulation in arguments.accumulation:
        job = Pacing(stages=arguments.stages, accumulation=accumulation, **pacing_of(arguments, 0.0))
        found = measure(job)
        ideal = (job.accumulation + job.stages - 1) / job.accumulation
        shown = Table(title=f"P = {job.stages}, a = {job.accumulation}; PACI's ideal speed-up is {ideal:.3f}")
        for column in ("schedule", "ms", "efficiency", "speed-up", "activations"):
            shown.add_column(column)
        for row in found:
            timed = f"{row['milliseconds']:.1f}", f"{row['efficiency']:.3f}", f"{row['speed_up']:.3f}"
            shown.add_row(row["schedule"], *timed, f"{row['activations']:.1f}")
        Console(width=100).print(shown)
        rows += found
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()

"""The simulator against real runs on paced stages, where every op takes a fixed time, so that any machine can tell.

    python -m benchmarks.simulator_vs_real              # the table; exit code 1 where a row is more than 5% off

DeepSpeed's 1F1B and PACI run in their engines; torch.distributed.pipelining's 1F1B, InterleavedZeroBubble (one stage a
rank: ZB-H1) and ZBVZeroBubble in theirs.  The simulator gets only the paced times, so what the runners take for
themselves counts as its error; longer ops (`--scale`) make that smaller.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from rich.console import Console
from rich.table import Table
from torch.distributed import pipelining

from benchmarks.engines import engine_for
from benchmarks.pacing import Pace, PacedLayer, micro_batches
from paci_schedule import PipelineSpec
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.figures import time_per_micro_batch
from testing.ranks import run_ranks

TOLERANCE = 0.05
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row; times in seconds, those of a whole stage."""

    runner: str
    schedule: str
    stages: int
    accumulation: int
    forward: float
    backward: float
    weight: float | None = None
    batches: int = 5


class PacedChunk(torch.nn.Module):
    """A stage whose forward, input gradient and weight gradient take a fixed time each."""

    def __init__(self, forward: float, backward: float, weight: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(8))
        self.seconds = forward, backward, weight

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        forward, backward, weight = self.seconds
        return Pace.apply(values, forward, backward) * Pace.apply(self.scale, 0.0, weight)


def _deepspeed(case: Case) -> list[float]:
    layers = [LayerSpec(PacedLayer, case.forward, case.backward + (case.weight or 0.0)) for _ in range(case.stages)]
    engine = engine_for(layers, case.schedule, accumulation=case.accumulation)
    data = micro_batches()
    return _timed(case, lambda: engine.train_batch(data))


def _pipelining(case: Case) -> list[float]:
    chosen, rank = schedule(case.schedule), torch.distributed.get_rank()
    at = [chosen.position(case.stages, rank, chunk) for chunk in range(chosen.chunks)]
    total, device = case.stages * chosen.chunks, torch.device("cpu")
    weight = 0.0 if case.weight is None else case.weight
    parts = [seconds / chosen.chunks for seconds in (case.forward, case.backward, weight)]
    held = [pipelining.PipelineStage(PacedChunk(*parts), position, total, device) for position in at]
    kinds = {
        "1f1b": pipelining.Schedule1F1B,
        "zb-h1": pipelining.ScheduleInterleavedZeroBubble,
        "zb-v": pipelining.ScheduleZBVZeroBubble,
    }
    made = kinds[case.schedule](
        held[0] if case.schedule == "1f1b" else held, case.accumulation, loss_fn=torch.nn.MSELoss()
    )
    data = [torch.ones(case.accumulation, 8, requires_grad=True)] if 0 in at else []
    target = {"target": torch.zeros(case.accumulation, 8)} if total - 1 in at else {}
    return _timed(case, lambda: made.step(*data, **target))


def _timed(case: Case, train_batch: Any) -> list[float]:
    """Seconds of each batch after the warm-up, on this rank."""
    warm = WARM_UP + -(-case.stages // case.accumulation)
    seconds = []
    for number in range(warm + case.batches):
        begin = time.perf_counter()
        train_batch()
        if number >= warm:
            seconds.append(time.perf_counter() - begin)
    return seconds


def measure(case: Case) -> dict[str, Any]:
    """Run one case; milliseconds per micro-batch, real and simulated, and by how much they differ."""
    runner = {"deepspeed": _deepspeed, "torch": _pipelining}[case.runner]
    work = (case.batches + 4) * (case.accumulation + case.stages)
    deadline = 120 + 4 * work * (case.forward + case.backward + (case.weight or 0.0))
    seconds = run_ranks(runner, case.stages, (case,), timeout=deadline)
    real = statistics.median(seconds[0]) / case.accumulation
    spec = PipelineSpec(stages=case.stages, accumulation=case.accumulation)
    costs = Costs(forward=case.forward, backward=case.backward, weight=case.weight)
    simulated = time_per_micro_batch(schedule(case.schedule), spec, costs)
    return asdict(case) | {"real": 1e3 * real, "simulated": 1e3 * simulated, "off": real / simulated - 1}


def cases(scale: float) -> list[Case]:
    """What is run, with all times multiplied by `scale`."""
    size: dict[str, Any] = {"stages": 4, "accumulation": 8}
    split = [
        {"forward": 0.06 * scale, "backward": 0.06 * scale, "weight": 0.06 * scale},
        {"forward": 0.09 * scale, "backward": 0.06 * scale, "weight": 0.05 * scale},
    ]
    return [
        Case(runner="deepspeed", schedule="1f1b", forward=0.04 * scale, backward=0.08 * scale, **size),
        Case(runner="deepspeed", schedule="paci", forward=0.04 * scale, backward=0.08 * scale, **size),
        Case(
            runner="deepspeed", schedule="paci", forward=0.07 * scale, backward=0.05 * scale, stages=3, accumulation=4
        ),
        *(
            Case(runner="torch", schedule=name, **costs, **size)
            for name in ("1f1b", "zb-h1", "zb-v")
            for costs in split
        ),
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    head = ("runner", "schedule", "P", "a", "F / B / W ms", "real ms", "simulated ms", "off")
    shown = Table(*head, title="milliseconds per micro-batch, median of the batches on the first stage")
    for row in rows:
        times = " / ".join(f"{1e3 * row[key]:g}" for key in ("forward", "backward", "weight") if row[key] is not None)
        figures = f"{row['real']:.1f}", f"{row['simulated']:.1f}", f"{row['off']:+.1%}"
        shown.add_row(row["runner"], row["schedule"], str(row["stages"]), str(row["accumulation"]), times, *figures)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", nargs="+", help="only these schedules")
    parser.add_argument("--scale", type=float, default=2.0, help="multiply all times (the engines' own work is not)")
    parser.add_argument("--json", help="file to write the rows to")
    arguments = parser.parse_args()
    rows, console = [], Console(width=110)
    for case in cases(arguments.scale):
        if not arguments.schedule or case.schedule in arguments.schedule:
            rows.append(measure(case))
            console.print(table(rows[-1:]))
    console.print(table(rows))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=2)
    sys.exit(any(abs(row["off"]) > TOLERANCE for row in rows))


if __name__ == "__main__":
    main()

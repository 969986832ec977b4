"""What the engine itself costs: microseconds per micro-batch when a stage has next to nothing to compute.

    python -m benchmarks.overhead

With one stage only the engine is measured, with two the links as well.  Both engines run in the same processes, in
turns; the median counts.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from deepspeed.pipe import LayerSpec
from rich.console import Console
from rich.table import Table

from benchmarks.engines import COMPARED, Race, engine_for, milliseconds, race
from testing.ranks import run_ranks


def _worker(accumulation: int, batches: int) -> Race:
    stages = torch.distributed.get_world_size()
    engines = {
        schedule: engine_for([LayerSpec(torch.nn.Linear, 8, 8)] * stages, schedule, accumulation=accumulation)
        for schedule in COMPARED
    }
    data = itertools.repeat((torch.ones(1, 8), torch.zeros(1, 8)))
    return race(engines, data, turns=5, batches=batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accumulation", type=int, default=16)
    parser.add_argument("--batches", type=int, default=20)
    arguments = parser.parse_args()
    shown = Table("P", "a", "1F1B us", "PACI us", "PACI / 1F1B", title="microseconds per micro-batch, median")
    for stages in (1, 2):
        races: list[Race] = run_ranks(_worker, stages, (arguments.accumulation, arguments.batches), timeout=300)
        medians = milliseconds(races, arguments.accumulation)
        stock, ours = 1e3 * medians["1f1b"], 1e3 * medians["paci"]
        shown.add_row(str(stages), str(arguments.accumulation), f"{stock:.0f}", f"{ours:.0f}", f"{ours / stock:.2f}")
    Console().print(shown)


if __name__ == "__main__":
    main()

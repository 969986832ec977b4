"""Stock 1F1B against PACI with real compute: transformer blocks cut into two stages, one core each.

    python -m benchmarks.real_compute

Both engines run in the same processes, in turns; the median batch counts.  The ideal ratio (a + 1) / a holds for stages
of equal cost; the compute shares say how equal they were.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from rich.console import Console
from rich.table import Table

from benchmarks.engines import COMPARED, Race, engine_for, milliseconds, race
from testing.ranks import run_ranks

_STAGES = 2
_WIDTH, _TOKENS, _SAMPLES = 256, 128, 4


def _worker(accumulation: int, blocks: int, turns: int, batches: int) -> Race:
    # Only blocks: an embedding or a head would make one stage heavier, and show the cut, not the schedule.
    engines: dict[str, Any] = {
        schedule: engine_for(
            [LayerSpec(torch.nn.TransformerEncoderLayer, _WIDTH, 4, 4 * _WIDTH, 0.0, batch_first=True)] * blocks,
            schedule,
            accumulation=accumulation,
            micro_batch=_SAMPLES,
        )
        for schedule in COMPARED
    }
    values = torch.randn(_SAMPLES, _TOKENS, _WIDTH)
    return race(engines, itertools.repeat((values, values.roll(1))), turns=turns, batches=batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--batches", type=int, default=5)
    arguments = parser.parse_args()
    shown = Table("a", "1F1B ms", "PACI ms", "ratio", "ideal", "of ideal", "compute shares")
    for accumulation in arguments.accumulation:
        job = accumulation, arguments.blocks, arguments.turns, arguments.batches
        races: list[Race] = run_ranks(_worker, _STAGES, job, timeout=600)
        medians = milliseconds(races, accumulation)
        ideal = (accumulation + 1) / accumulation
        ratio = medians["1f1b"] / medians["paci"]
        shown.add_row(
            str(accumulation),
            f"{medians['1f1b']:.1f}",
            f"{medians['paci']:.1f}",
            f"{ratio:.3f}",
            f"{ideal:.3f}",
            f"{ratio / ideal:.3f}",
            ", ".join(f"{seen.compute_share['paci']:.3f}" for seen in races),
        )
    Console().print(shown)


if __name__ == "__main__":
    main()

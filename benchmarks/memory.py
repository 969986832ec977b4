"""Peak activation memory of every stage: stock 1F1B against PACI.

    python -m benchmarks.memory --stages 4 --accumulation 8

Counts the bytes of every tensor that is made during `train_batch` and still alive (activations, received messages,
gradients on their way), by watching each storage from its creation to its end; weights, their gradients and optimizer
states exist before and do not count.  In-flight micro-batches as the engine counts them stand beside, for 1F1B its
number of pipeline buffers' bound min(P - s, a).
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from rich.console import Console
from rich.table import Table

from benchmarks.engines import COMPARED, engine_for
from paci_schedule.measure.live_bytes import LiveBytes
from testing.ranks import run_ranks

_WIDTH, _TOKENS = 128, 256


class Block(torch.nn.Module):
    """A transformer's feed-forward half, as a stand-in for a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(_WIDTH, 4 * _WIDTH), torch.nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.down(torch.nn.functional.gelu(self.up(values)))


def peaks(accumulation: int, samples: int, peak_of: Callable[[Callable[[], None]], int]) -> dict[str, Any]:
    """On a rank, by schedule the most bytes that three batches hold at once; and PACI's micro-batches in flight.

    Args:
        accumulation: micro-batches to an update.
        samples: in a micro-batch.
        peak_of: does some work, and says how many bytes it held beyond those that were there before.
    """
    stages = torch.distributed.get_world_size()
    shape = samples, _TOKENS, _WIDTH
    found: dict[str, Any] = {}
    for schedule in COMPARED:
        layers = [LayerSpec(Block)] * (4 * stages)
        engine = engine_for(layers, schedule, accumulation=accumulation, micro_batch=samples)
        data = itertools.repeat((torch.ones(shape), torch.zeros(shape)))

        def train(batches: int, engine: Any = engine, data: Any = data) -> None:
            for _ in range(batches):
                engine.train_batch(data)

        train(2)  # gradients and optimizer states come into being
        engine.reset_activation_shape()  # so that 1F1B makes its message buffers anew, under the counter, as PACI does
        if schedule == "paci":
            engine.drain()
        found[schedule] = peak_of(functools.partial(train, 3))
        if schedule == "paci":
            found["peak_in_flight"] = engine.pipeline_stats()["peak_in_flight"]
        del engine, train
    return found


def live_peak(work: Callable[[], None]) -> int:
    """The most bytes of tensors made by `work` that are alive at once."""
    with LiveBytes() as counter:
        work()
    return counter.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=8)
    arguments = parser.parse_args()
    ranks = run_ranks(peaks, arguments.stages, (arguments.accumulation, 1, live_peak), timeout=300)
    shown = Table("stage", "1F1B in flight", "PACI in flight", "1F1B KiB", "PACI KiB", "PACI / 1F1B")
    for stage, row in enumerate(ranks):
        bound = min(arguments.stages - stage, arguments.accumulation)
        stock, ours = row["1f1b"], row["paci"]
        shown.add_row(
            str(stage),
            str(bound),
            str(row["peak_in_flight"]),
            f"{stock / 1024:.0f}",
            f"{ours / 1024:.0f}",
            f"{ours / stock:.3f}",
        )
    Console().print(shown)


if __name__ == "__main__":
    main()

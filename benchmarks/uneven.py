"""Uneven stages: PACI under DeepSpeed's own cuts of a GPT and under the measured one.

    python -m benchmarks.uneven                                              # the tables in docs/uneven-stages.md
    python -m benchmarks.uneven --vocabulary 32768 --blocks 16 --stages 2 4 --paced-stages 8

Embedding and head have more parameters than a block; the head with the loss also takes several times as long, the
embedding next to nothing.  One rank measures each layer; then PACI trains the same model under every cut, in turns:
with real compute where there is a core for every stage, and for more stages with layers that sleep in the measured
proportions.  The ideal is the sum of all layers over P, as if they could be divided at will.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.utils import partition_balanced, partition_uniform
from rich.console import Console
from rich.table import Table

from benchmarks.engines import Race, engine_for, milliseconds, race
from benchmarks.gpt import gpt_layers, token_loss
from benchmarks.pacing import PacedLayer
from paci_schedule import PipelineSpec
from paci_schedule.adapters.deepspeed import layer_costs
from paci_schedule.plan.layers import Layer
from paci_schedule.plan.partition import Partition, balance, evaluate, memory_of_stages
from testing.ranks import run_ranks

_HEADS = 4


@dataclass(frozen=True, kw_only=True)
class Model:
    """The GPT and its micro-batch."""

    vocabulary: int
    hidden: int
    blocks: int
    samples: int
    tokens: int

    def layers(self) -> list[LayerSpec]:
        return gpt_layers(
            vocabulary=self.vocabulary, tokens=self.tokens, width=self.hidden, heads=_HEADS, blocks=self.blocks
        )

    def micro_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(self.vocabulary, (self.samples, self.tokens), generator=torch.Generator().manual_seed(1))
        return ids, ids.roll(-1, dims=1)


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How long to race."""

    accumulation: int
    turns: int
    batches: int


def profile(model: Model, repeats: int) -> list[Layer]:
    """What the layers cost."""
    return layer_costs(model.layers(), model.micro_batch(), loss_fn=token_loss, repeats=repeats)


def cuts_of(costs: Sequence[Layer], stages: int) -> dict[str, Partition]:
    """By name of the method; DeepSpeed's own as its PipelineModule would cut."""
    memories = memory_of_stages(PipelineSpec(stages=stages, accumulation=1))
    bounds = {
        "uniform": partition_uniform(len(costs), stages),
        "parameters": [int(bound) for bound in partition_balanced([int(cost.parameters) for cost in costs], stages)],
    }
    cuts = {name: evaluate(costs, memories, bound) for name, bound in bounds.items()}
    return {**cuts, "profile": balance(costs, memories)}


def _real(model: Model, cuts: dict[str, Partition], rounds: Rounds) -> Race:
    def engine(cut: Partition) -> Any:
        options = {"micro_batch": model.samples, "loss": token_loss, "cut": cut.bounds}
        return engine_for(model.layers(), "paci", accumulation=rounds.accumulation, **options)

    return _race(engine, cuts, model.micro_batch(), rounds)


def _paced(costs: Sequence[Layer], cuts: dict[str, Partition], rounds: Rounds) -> Race:
    def engine(cut: Partition) -> Any:
        layers = [LayerSpec(PacedLayer, cost.forward, cost.backward) for cost in costs]
        return engine_for(layers, "paci", accumulation=rounds.accumulation, cut=cut.bounds)

    return _race(engine, cuts, (torch.ones(1, 8), torch.zeros(1, 8)), rounds)


def _race(engine: Callable[[Partition], Any], cuts: dict[str, Partition], micro_batch: tuple, rounds: Rounds) -> Race:
    engines = {name: engine(cut) for name, cut in cuts.items()}
    return race(engines, itertools.repeat(micro_batch), turns=rounds.turns, batches=rounds.batches)


def measure(kind: str, stages: int, costs: Sequence[Layer], model: Model, rounds: Rounds) -> list[dict[str, Any]]:
    """Race the cuts of one kind of stages; a row for each cut."""
    cuts = cuts_of(costs, stages)
    different = {cut.bounds: name for name, cut in reversed(cuts.items())}  # the first name of those that are alike
    raced = {name: cuts[name] for name in cuts if name in different.values()}
    slots = len(raced) * (3 + rounds.turns * (1 + rounds.batches)) * (rounds.accumulation + stages)
    deadline = 120 + 4 * slots * max(cut.slowest for cut in raced.values())
    worker, job = (_real, model) if kind == "real" else (_paced, costs)
    races: list[Race] = run_ranks(worker, stages, (job, raced, rounds), timeout=deadline)
    medians = milliseconds(races, rounds.accumulation)
    return [
        {
            "stages": stages,
            "kind": kind,
            "cut": ", ".join(same for same in cuts if cuts[same].bounds == cut.bounds),
            "bounds": cut.bounds,
            "slowest": 1e3 * cut.slowest,
            "milliseconds": medians[name],
            "ideal": 1e3 * cut.ideal,
            "of_ideal": 1e3 * cut.ideal / medians[name],
            "speed_up": medians["uniform"] / medians[name],
            "compute_share": [seen.compute_share[name] for seen in races],
        }
        for name, cut in raced.items()
    ]


def layer_table(layers: Sequence[LayerSpec], costs: Sequence[Layer]) -> Table:
    """What was measured, for people."""
    head = ("layer", "parameters", "F ms", "B ms", "keeps KiB")
    shown = Table(*head, title="one micro-batch; the last layer with the loss")
    for layer, cost in zip(layers, costs, strict=True):
        kept = (cost.input_bytes + cost.saved_bytes) / 2**10
        shown.add_row(
            layer.typename.__name__,
            f"{cost.parameters:,}",
            f"{1e3 * cost.forward:.1f}",
            f"{1e3 * cost.backward:.1f}",
            f"{kept:,.0f}",
        )
    return shown


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
    head = ("P", "cut", "bounds", "predicted", "ms", "ideal", "of ideal", "speed-up", "compute %")
    shown = Table(*head, title="PACI, milliseconds per micro-batch, median; speed-up over the first cut")
    for row in rows:
        shown.add_row(
            f"{row['stages']}, {row['kind']}",
            row["cut"],
            " ".join(map(str, row["bounds"])),
            f"{row['slowest']:.1f}",
            f"{row['milliseconds']:.1f}",
            f"{row['ideal']:.1f}",
            f"{row['of_ideal']:.3f}",
            f"{row['speed_up']:.3f}",
            " ".join(f"{100 * share:.0f}" for share in row["compute_share"]),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=128, help=f"a multiple of {_HEADS}")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4, help="in a micro-batch")
    parser.add_argument("--tokens", type=int, default=128, help="in a sample")
    parser.add_argument("--stages", type=int, nargs="*", default=[2], help="with real compute: a core for each")
    parser.add_argument("--paced-stages", type=int, nargs="*", default=[4], help="with layers that sleep")
    parser.add_argument("--pace", type=float, default=100.0, help="ideal milliseconds of a paced micro-batch")
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15, help="of each layer in the profile")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batches", type=int, default=4, help="in a turn")
    parser.add_argument("--json", help="file to write the rows to")
    arguments = parser.parse_args()
    known = vars(arguments)
    model = Model(**{name: known[name] for name in ("vocabulary", "hidden", "blocks", "samples", "tokens")})
    rounds = Rounds(**{name: known[name] for name in ("accumulation", "turns", "batches")})
    (costs,) = run_ranks(profile, 1, (model, arguments.repeats), timeout=600)
    console = Console(width=120)
    console.print(layer_table(model.layers(), costs))
    rows = []
    for stages in arguments.stages:
        rows += measure("real", stages, costs, model, rounds)
    total = sum(cost.forward + cost.backward for cost in costs)
    for stages in arguments.paced_stages:
        rows += measure("paced", stages, _scaled(costs, 1e-3 * arguments.pace * stages / total), model, rounds)
    console.print(table(rows))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"layers": [asdict(cost) for cost in costs], "rows": rows}, file, indent=2)


def _scaled(costs: Sequence[Layer], scale: float) -> list[Layer]:
    return [replace(cost, forward=scale * cost.forward, backward=scale * cost.backward) for cost in costs]


if __name__ == "__main__":
    main()

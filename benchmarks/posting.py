"""What it costs to post a gradient's receive where it is sent, and not an op earlier: paced stages on slow links.

    python -m benchmarks.posting                        # P = 4, a = 8, 5 and 20 ms: the table in docs/results.md

A transfer begins when the message is sent and its receive posted, as on NCCL, and then takes `--latency`.  The default
order and `early_receives` run in the same processes, in turns, with and without a round of slack on each link; on equal
stages, and with the second stage 1.25 times as slow as the others.  Beside each time stands the simulator's
(`paci_schedule.simulate.transfers`).
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, dataclass
from typing import Any

from deepspeed.pipe import LayerSpec
from rich.console import Console
from rich.table import Table

from benchmarks.delayed import use_delayed_links
from benchmarks.engines import Race, engine_for, milliseconds, race
from benchmarks.pacing import PacedLayer, Pacing, add_pacing, micro_batches, pacing_of
from paci_schedule import PipelineSpec
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.transfers import simulate_transfers
from testing.ranks import run_ranks

_SLOWER = 1.25
_ORDERS = {"default": False, "early": True}


@dataclass(frozen=True, kw_only=True)
class Orders(Pacing):
    """Four rows of the table: a race of the orders in which receives are posted.

    Attributes:
        slow_stage: the one that takes longer than the others, if any.
    """

    slow_stage: int | None

    def scale(self, stage: int) -> float:
        return _SLOWER if stage == self.slow_stage else 1.0

    def spec(self, slack: int) -> PipelineSpec:
        return PipelineSpec(
            stages=self.stages, accumulation=self.accumulation, extra_in_flight=(slack,) * (self.stages - 1)
        )


def _worker(job: Orders) -> Race:
    use_delayed_links(job.latency, rendezvous=True)
    scales = [job.scale(stage) for stage in range(job.stages)]
    layers = [LayerSpec(PacedLayer, scale * job.forward, scale * job.backward) for scale in scales]
    engines = {}
    for slack, (name, early) in itertools.product((0, 1), _ORDERS.items()):
        options = {"extra_in_flight": job.spec(slack).extra_in_flight, "early_receives": early}
        engines[f"{name} {slack}"] = engine_for(layers, "paci", accumulation=job.accumulation, paci=options)
    return race(engines, micro_batches(), turns=job.turns, batches=job.batches)


def simulated(job: Orders, slack: int, early: bool) -> float:
    """Milliseconds per micro-batch, in the steady state."""
    scales, warm, batches = [job.scale(stage) for stage in range(job.stages)], 40, 40
    costs = Costs(
        forward=[scale * job.forward for scale in scales],
        backward=[scale * job.backward for scale in scales],
        latency=job.latency,
    )
    timeline = simulate_transfers(schedule("paci"), job.spec(slack), costs, warm + batches, early_receives=early)
    ends = [timeline.rows[0][done - 1].end for done in timeline.calls[0]]
    return 1e3 * (ends[warm + batches - 1] - ends[warm - 1]) / (batches * job.accumulation)


def measure(job: Orders) -> list[dict[str, Any]]:
    """Run one job: for each slack and order the median milliseconds per micro-batch, and the simulator's."""
    slot = _SLOWER * (job.forward + job.backward) + 4 * job.latency
    batches = 4 * (job.turns * (job.batches + 1) + 5)
    races: list[Race] = run_ranks(
        _worker, job.stages, (job,), timeout=180 + 2 * batches * (job.accumulation + job.stages) * slot
    )
    medians = milliseconds(races, job.accumulation)
    return [
        {
            **asdict(job),
            "slack": slack,
            "order": name,
            "milliseconds": medians[f"{name} {slack}"],
            "simulated": simulated(job, slack, early),
        }
        for slack, (name, early) in itertools.product((0, 1), _ORDERS.items())
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    head = ("latency", "stages", "slack", "order", "ms", "simulated", "off")
    shown = Table(*head, title="milliseconds per micro-batch, median")
    for row in rows:
        slow = row["slow_stage"]
        shown.add_row(
            f"{1e3 * row['latency']:g}",
            "equal" if slow is None else f"{slow} is {_SLOWER:g}x",
            str(row["slack"]),
            row["order"],
            f"{row['milliseconds']:.1f}",
            f"{row['simulated']:.1f}",
            f"{row['milliseconds'] / row['simulated'] - 1:+.1%}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--latency", type=float, nargs="+", default=[5.0, 20.0], help="milliseconds")
    add_pacing(parser)
    arguments = parser.parse_args()
    rows, console = [], Console(width=100)
    for latency, slow_stage in itertools.product(arguments.latency, (None, 1)):
        size = {"stages": arguments.stages, "accumulation": arguments.accumulation}
        job = Orders(**size, **pacing_of(arguments, latency), slow_stage=slow_stage)
        rows += measure(job)
        console.print(table(rows[-4:]))
    console.print(table(rows))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()

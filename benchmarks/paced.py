"""Stock 1F1B against PACI on paced stages: forwards and backwards take fixed times, so any machine shows the schedule.

    python -m benchmarks.paced                                                  # P = 2, 4, 8 and a = 4, 8, 16
    python -m benchmarks.paced --stages 4 --accumulation 8 --latency 20 --slack 0+0+1 0+1+1 1+1+1
    python -m benchmarks.paced --stages 4 8 --accumulation 8 --tied

All engines run in the same processes, in turns, after a warm-up; the median batch counts.  The ideal for 1F1B is
(a + P - 1) / a times F + B, for PACI it is F + B.  `--latency` delays every message; `--tied` shares a weight between
the first and the last stage.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, dataclass
from typing import Any

from deepspeed.pipe import LayerSpec, TiedLayerSpec
from rich.console import Console
from rich.table import Table

from benchmarks.delayed import use_delayed_links
from benchmarks.engines import Race, engine_for, milliseconds, race
from benchmarks.pacing import PacedLayer, Pacing, add_pacing, micro_batches, pacing_of
from testing.ranks import run_ranks


@dataclass(frozen=True, kw_only=True)
class Comparison(Pacing):
    """One race of 1F1B and PACI.

    Attributes:
        slack: for each engine of PACI, the micro-batches of slack at each link.
        tied: whether one more has a weight that the first and the last stage share.
    """

    slack: tuple[tuple[int, ...], ...]
    tied: bool


def build(job: Pacing, schedule: str, *, extra_in_flight: tuple[int, ...] | int = 0, tied: bool = False) -> Any:
    """A DeepSpeed engine over `job.stages` paced stages."""
    pace = job.forward, job.backward
    layers = [LayerSpec(PacedLayer, *pace) for _ in range(job.stages)]
    if tied:
        layers[0] = layers[-1] = TiedLayerSpec("tied", PacedLayer, *pace, tied_weight_attr="weight")
    options = {"extra_in_flight": extra_in_flight}
    return engine_for(layers, schedule, accumulation=job.accumulation, paci=options)


def _worker(job: Comparison) -> Race:
    if job.latency:
        use_delayed_links(job.latency)
    engines = {"1F1B": build(job, "1f1b")}
    for slack in job.slack:
        name = f"PACI, slack {'+'.join(map(str, slack))}" if any(slack) else "PACI"
        engines[name] = build(job, "paci", extra_in_flight=slack)
    if job.tied:
        engines["PACI, tied"] = build(job, "paci", tied=True)
    return race(engines, micro_batches(), turns=job.turns, batches=job.batches)


def measure(job: Comparison) -> list[dict[str, Any]]:
    """Run one job: for each engine the median milliseconds per micro-batch, beside the ideal."""
    slot = job.forward + job.backward + 4 * job.latency
    batches = (2 + len(job.slack)) * job.turns * (job.batches + 4)
    races: list[Race] = run_ranks(
        _worker, job.stages, (job,), timeout=120 + 2 * batches * (job.accumulation + job.stages) * slot
    )
    rows = []
    for name, median in milliseconds(races, job.accumulation).items():
        row = {**asdict(job), "engine": name, "milliseconds": median, "ideal": 1e3 * (job.forward + job.backward)}
        if name == "1F1B":
            stock = median
            row["ideal"] *= (job.accumulation + job.stages - 1) / job.accumulation
        else:
            row["compute_share"] = [seen.compute_share[name] for seen in races]
            for key in ("peak_in_flight", "max_drift", "drift_bound"):
                row[key] = [seen.stats[name][key] for seen in races]
        row["speed_up"] = stock / median
        row["ideal_speed_up"] = rows[0]["ideal"] / row["ideal"] if rows else 1.0
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    head = ("P", "a", "engine", "ms", "ideal", "speed-up", "ideal", "of ideal", "compute", "in flight", "drift")
    shown = Table(*head, title="milliseconds per micro-batch, median; least share of compute over the stages")
    for row in rows:
        ours = "compute_share" in row
        shown.add_row(
            str(row["stages"]),
            str(row["accumulation"]),
            row["engine"],
            f"{row['milliseconds']:.1f}",
            f"{row['ideal']:.1f}",
            f"{row['speed_up']:.3f}",
            f"{row['ideal_speed_up']:.3f}",
            f"{row['speed_up'] / row['ideal_speed_up']:.3f}",
            f"{min(row['compute_share']):.3f}" if ours else "",
            str(row["peak_in_flight"][0]) if ours else "",
            f"{max(row['max_drift'])} of {max(row['drift_bound'])}" if ours else "",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--accumulation", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--latency", type=float, default=0.0, help="milliseconds that every message takes longer")
    parser.add_argument(
        "--slack", nargs="+", default=[], help="also PACI with these rounds of slack on the links, such as 1+1+1"
    )
    parser.add_argument("--tied", action="store_true", help="also with a weight tied between first and last stage")
    add_pacing(parser)
    arguments = parser.parse_args()
    rows = []
    for stages, accumulation in itertools.product(arguments.stages, arguments.accumulation):
        job = Comparison(
            stages=stages,
            accumulation=accumulation,
            **pacing_of(arguments, arguments.latency),
            slack=((0,) * (stages - 1), *(tuple(map(int, slack.split("+"))) for slack in arguments.slack)),
            tied=arguments.tied,
        )
        rows += measure(job)
    Console(width=120).print(table(rows))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()

"""Loss per token of each schedule at its own best learning rate: rehearsals over a grid of rates and seeds.

    python -m benchmarks.convergence --text input.txt --optimizer adamw --rates 4e-3,8e-3,1.6e-2 --seeds 0 \
        --variants flush,paci,paci:every --results runs.jsonl
    python -m benchmarks.convergence --results runs.jsonl

A *variant* is a schedule, for PACI with its prediction behind a colon, the prediction's reach behind another, and the
number of the first updates that run under a flush behind a third.
Every run is a line of the results; a run that has a line already is not repeated, so that a study can be interrupted,
extended and shared between processes.  Without a text nothing is run.  At the end the table of all results is printed,
in Markdown.

The rate of a variant, with its warm-up, is chosen by one seed, with which most of its rates have been run; its loss is
then the mean over all seeds at that rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from paci_schedule.cli.rehearse import MODELS
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.draw.dark import follow_the_reader
from paci_schedule.rehearse.comparison import ideal_time
from paci_schedule.rehearse.text import Text
from paci_schedule.rehearse.trial import Settings, run
from paci_schedule.rehearse.variant import Variant

Run = Mapping[str, Any]

_POINTS = 100  # of a run's training curve that are kept
_SHAPE = "text", "vocabulary", "stages", "accumulation", "layers", "width", "micro_batches", "dtype", "optimizer"
_NAMES = {
    "flush": "1F1B with flush",
    "paci": "PACI",
    "paci-stash": "PACI with a stash",
    "pipedream": "PipeDream",
    "pipedream-2bw": "PipeDream-2BW",
}
_COLUMNS = (
    *("text", "P", "a", "optimizer", "dtype", "schedule", "prediction", "rate (of)", "seeds", "validation loss"),
    *("minus flush's", "sooner at flush's loss", "ideal"),
)
_SHOWN = "stages", "accumulation", "width", "optimizer", "dtype"
_VARIANT = "schedule", "prediction", "prediction_reach", "flush_warmup_steps"
_SETTINGS = *_SHAPE, "context", "micro_batch", *_VARIANT, "length", "lr", "warm_up", "seed"


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.text is not None:
        for wanted in _wanted(arguments):
            if all(_key(wanted) != _key(each) for each in _read(arguments.results)):
                line = json.dumps(_train(wanted, arguments.text))
                with arguments.results.open("a") as file:
                    file.write(line + "\n")
    runs = _read(arguments.results)
    for line in table(runs):
        print(line)
    if arguments.plot is not None:
        shown = {name: getattr(arguments, name) for name in _SHOWN} | {"text": arguments.plot_text or runs[0]["text"]}
        drawn = [each for each in runs if all(each[name] == value for name, value in shown.items())]
        variants = {_parsed(variant) for variant in arguments.variants}
        draw([each for each in drawn if _variant(each) in variants], arguments.plot)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, read and added to")
    parser.add_argument("--text", type=Path, help="to train on, UTF-8; its last tenth is for validation")
    parser.add_argument("--vocabulary", type=int, default=0, help="of a byte-pair encoding; 0 takes characters")
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--micro-batches", type=int, default=6400, help="of a run of length 1")
    parser.add_argument("--dtype", default="fp32", help="fp32, or bf16 with fp32 masters")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--variants", type=_words, default=["flush", "paci", "paci:every"])
    parser.add_argument("--lengths", type=_numbers, default=[1.0], help="of a run, relative")
    parser.add_argument("--rates", type=_numbers, default=[4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--warm-up", type=int, default=400, help="micro-batches until the rate is reached")
    parser.add_argument("--seeds", type=_numbers, default=[0])
    parser.add_argument(
        "--plot", type=Path, help="draw these variants with this P, a, width, optimizer and dtype at their best rates"
    )
    parser.add_argument("--plot-text", metavar="NAME", help="of the runs to draw [that of the first run]")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[float]:
    return [float(each) for each in text.split(",")]


def _read(results: Path) -> list[Run]:
    lines = results.read_text().splitlines() if results.exists() else []
    return [{"flush_warmup_steps": 0, **json.loads(line)} for line in lines]  # which older results do not name


def _key(run: Run) -> tuple[Any, ...]:
    return tuple(run[name] for name in _SETTINGS)


def _wanted(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The settings of all runs that were asked for."""
    common = {name: getattr(arguments, name) for name in _SHAPE if name != "text"}
    common |= {"text": arguments.text.stem} | {name: MODELS["tiny"][name] for name in ("context", "micro_batch")}
    grid = itertools.product(arguments.seeds, arguments.lengths, arguments.rates, arguments.variants)
    for seed, length, rate, variant in grid:
        settings = {"length": length, "lr": rate, "warm_up": arguments.warm_up, "seed": int(seed)}
        yield {**common, **asdict(_parsed(variant)), **settings}


def _parsed(variant: str) -> Variant:
    schedule, _, prediction = variant.partition(":")
    return Variant.parse(schedule, prediction or "off")


def _train(wanted: Run, path: Path) -> dict[str, Any]:
    """Run it; what it came to, beside its settings."""
    updates = _batches(wanted)
    named = {field.name for field in fields(Settings)} - {"updates", "device"}
    settings = Settings(updates=updates, device="cpu", **{name: wanted[name] for name in named})
    text = Text(path, settings.context, torch.device("cpu"), wanted["vocabulary"])
    found = run(settings, text, _variant(wanted), updates, lambda: None).facts()
    each = -(-len(found["losses"]) // _POINTS)
    curve = [round(statistics.fmean(found["losses"][at : at + each]), 4) for at in range(0, len(found["losses"]), each)]
    return {
        **wanted,
        "updates": updates,
        "validation": round(found["validation"], 4),
        "drift": max(found["drift"]),
        "seconds": round(found["seconds"]),
        "curve": curve,
        "machine": f"{platform.machine()} CPU, torch {torch.__version__}",
    }


def table(runs: Iterable[Run]) -> Iterator[str]:
    """Markdown: a row for each variant, at its best rate, beside what else was run with the same model and data."""
    by_shape: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for each in runs:
        by_shape[tuple(each[name] for name in _SHAPE)].append(each)
    yield "| " + " | ".join(_COLUMNS) + " |"
    yield "|" + "---|" * len(_COLUMNS)
    for shape, several in by_shape.items():
        named = dict(zip(_SHAPE, shape, strict=True))
        text = f"{named['text']}{', BPE ' + str(named['vocabulary']) if named['vocabulary'] else ''}"
        text += f", {named['width']} wide" if named["width"] != MODELS["tiny"]["width"] else ""
        head = [text, named["stages"], named["accumulation"], named["optimizer"], named["dtype"]]
        yield from ("| " + " | ".join(map(str, [*head, *row])) + " |" for row in _rows(several))


def _rows(runs: Sequence[Run]) -> Iterator[list[Any]]:
    by_variant = _by_variant(runs)
    flush = _at_best_rate(by_variant.get(Variant("flush"), []))
    for variant, several in by_variant.items():
        best = _at_best_rate(several)
        whole = {each["seed"]: each["validation"] for each in best if each["length"] == 1}
        if not whole:
            continue
        tried = ", ".join(_named(rate) for rate in sorted({_rate(each) for each in several}))
        losses = list(whole.values())
        spread = f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else ""
        row = [variant.schedule, variant.when, f"{_named(_rate(best[0]))} ({tried})"]
        row += [", ".join(map(str, sorted(whole))), f"{statistics.fmean(losses):.4f}{spread}"]
        base = {each["seed"]: each["validation"] for each in flush if each["length"] == 1}
        both = sorted(set(base) & set(whole))
        row.append(f"{statistics.fmean(whole[seed] - base[seed] for seed in both):+.4f}" if both else "")
        yield row + (_speed_up(flush, best) if variant.schedule != "flush" else ["1", "1"])


def _variant(run: Run) -> Variant:
    return Variant(*(run[name] for name in _VARIANT))


def _by_variant(runs: Iterable[Run]) -> dict[Variant, list[Run]]:
    by_variant: dict[Variant, list[Run]] = defaultdict(list)
    for each in runs:
        by_variant[_variant(each)].append(each)
    return by_variant


def _at_best_rate(runs: Sequence[Run]) -> list[Run]:
    """Of one variant: the runs with the rate whose loss is least with the seed that most rates have been run with."""
    seeds: dict[tuple[float, int], dict[int, float]] = defaultdict(dict)
    for each in runs:
        if each["length"] == 1:
            seeds[_rate(each)][each["seed"]] = each["validation"]
    if not seeds:
        return []
    counts = Counter(seed for found in seeds.values() for seed in found)
    tuned = min(counts, key=lambda seed: (-counts[seed], seed))
    best = min((rate for rate in seeds if tuned in seeds[rate]), key=lambda rate: seeds[rate][tuned])
    return [each for each in runs if _rate(each) == best]


def _rate(run: Run) -> tuple[float, int]:
    """What is chosen for each variant: the highest learning rate and the warm-up."""
    return run["lr"], run["warm_up"]


def _named(rate: tuple[float, int]) -> str:
    return f"{rate[0]:g}" + ("" if rate[1] == 400 else f" after {rate[1]}")


def _speed_up(flush: Sequence[Run], runs: Sequence[Run]) -> list[str]:
    """How much sooner the mean loss is flush's, in ideal time, by the shortest run that gets there; and the ideal."""
    base = {each["seed"]: each for each in flush if each["length"] == 1}
    variant, whole, reached = _variant(runs[0]), {**runs[0], "length": 1}, []
    flushing, streaming = (_ideal_time(whole, each) for each in (Variant("flush"), variant))
    for length in sorted({each["length"] for each in runs}):
        found = {each["seed"]: each for each in runs if each["length"] == length}
        both = sorted(set(base) & set(found))
        if both and sum(found[seed]["validation"] - base[seed]["validation"] for seed in both) <= 0:
            reached.append(flushing / _ideal_time(found[both[0]], variant))
    return [f"{max(reached):.3f}" if reached else "not reached", f"{flushing / streaming:.3f}"]


def _ideal_time(run: Run, variant: Variant) -> int:
    """The least time of a run, if it were one of this variant."""
    return ideal_time(variant, PipelineSpec(stages=run["stages"], accumulation=run["accumulation"]), _batches(run))


def _batches(run: Run) -> int:
    return round(run["micro_batches"] * run["length"] / run["accumulation"])


def draw(runs: Sequence[Run], path: Path) -> None:
    """Write a picture of the training losses against tokens and against ideal time, each variant at its best rate."""
    with rc_context({"svg.hashsalt": "paci", "svg.fonttype": "none"}):
        figure = _figure(runs)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    if path.suffix == ".svg":
        path.write_text(follow_the_reader(path.read_text()))


def _figure(runs: Sequence[Run]) -> Figure:
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    tokens, time = figure.subplots(1, 2, sharey=True)
    for variant, several in _by_variant(runs).items():
        best = [each for each in _at_best_rate(several) if each["length"] == 1]
        if not best:
            continue
        first = min(best, key=lambda each: each["seed"])
        label = _NAMES[variant.schedule] + ("" if variant.prediction == "off" else f", prediction {variant.when}")
        ends = [(number + 1) / len(first["curve"]) for number in range(len(first["curve"]))]
        amount = first["micro_batches"] * first["micro_batch"] * first["context"] * 1e-6
        duration = _ideal_time(first, variant) / first["micro_batches"]
        tokens.plot([end * amount for end in ends], first["curve"], label=label)
        time.plot([end * duration for end in ends], first["curve"], label=label)
    lowest = min(min(each["curve"]) for each in runs)
    tokens.set(xlabel="tokens (millions)", ylabel="training loss (nats)", ylim=(lowest - 0.05, lowest + 1))
    time.set(xlabel="ideal time (PACI's whole run is 1)")
    for axis in (tokens, time):
        axis.grid(alpha=0.3)
    time.legend()
    return figure


if __name__ == "__main__":
    main()

"""`paci rehearse`: find out in one process what schedules and predictions do to the loss of a small GPT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from paci_schedule.cli.options import json_option
from paci_schedule.cli.printing import print_json, screen
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError, UnsupportedError, nearest

__all__ = ["MODELS", "rehearse"]

MODELS = {
    "tiny": {"layers": 8, "width": 48, "context": 64, "micro_batch": 4, "updates": 800, "lr": 4e-3},
    "small": {"layers": 12, "width": 384, "context": 256, "micro_batch": 8, "updates": 2000, "lr": 1e-3},
}


@click.command("rehearse")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="Text to train on; its end is for validation.",
)
@click.option("--stages", type=int, required=True, metavar="P", help="Number of pipeline stages.")
@click.option("--accumulation", type=int, required=True, metavar="A", help="Number of micro-batches in an update.")
@click.option(
    "--schedules",
    default="flush,paci",
    metavar="NAME[,NAME...]",
    help="flush, paci, paci-stash, pipedream, pipedream-2bw (default flush,paci).",
)
@click.option(
    "--prediction",
    default="off,every",
    metavar="WHEN[,WHEN...]",
    help="When paci predicts weights for stale forwards: off, window, every, or k for every k-th; a reach may follow, "
    "as in every:1.5, and then a number of first updates to flush, as in every:1.5:40 (default off,every).",
)
@click.option(
    "--model",
    default="tiny",
    metavar="NAME",
    help="tiny or small: sets the defaults of the next six options (default tiny).",
)
@click.option("--layers", type=int, metavar="L", help="Number of blocks.")
@click.option("--width", type=int, metavar="W", help="Width of the model, a multiple of 12.")
@click.option("--context", type=int, metavar="T", help="Tokens in a sequence.")
@click.option("--micro-batch", type=int, metavar="S", help="Sequences in a micro-batch.")
@click.option("--updates", type=int, metavar="N", help="Number of updates in a run at equal tokens.")
@click.option(
    "--lr", type=float, metavar="RATE", help="The highest learning rate; Muon's matrices take 5 times as much."
)
@click.option(
    "--warm-up", type=int, default=400, metavar="N", help="Micro-batches until that rate is reached (default 400)."
)
@click.option("--optimizer", default="adamw", metavar="NAME", help="adamw, nadam or muon (default adamw).")
@click.option(
    "--dtype",
    default="fp32",
    metavar="NAME",
    help="Type of the weights: fp32, or bf16 with fp32 masters (default fp32).",
)
@click.option(
    "--vocabulary",
    type=click.IntRange(0),
    default=0,
    metavar="V",
    help="Size of a byte-pair encoding; 0 takes characters (default 0).",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, metavar="N", help="Seed of the weights and the data (default 0)."
)
@click.option("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one).")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw the loss curves into a .png or .svg file.",
)
@json_option
def rehearse(
    text: Path,
    schedules: str,
    prediction: str,
    model: str,
    vocabulary: int,
    device: str | None,
    output: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Train a small GPT on a text under several schedules, in this process.

    Everything is computed in the order of the engines, so the losses are those of the engines; only the time differs.
    """
    if model not in MODELS:
        raise ConfigError(f"model={model!r}: must be one of {nearest(model, MODELS)}")
    spec = PipelineSpec(stages=given["stages"], accumulation=given["accumulation"])
    chosen = MODELS[model] | {name: value for name, value in given.items() if value is not None}
    try:
        import torch
    except ImportError:
        raise UnsupportedError("paci rehearse trains with torch, which is not installed; pip install torch") from None
    from paci_schedule.rehearse.comparison import batches_of, compare, variants
    from paci_schedule.rehearse.text import Text
    from paci_schedule.rehearse.trial import Settings

    asked = variants(spec, schedules.split(","), prediction.split(","))
    settings = Settings(device=device or ("cuda" if torch.cuda.is_available() else "cpu"), **chosen)
    corpus = Text(text, settings.context, _device(settings.device), vocabulary)
    total = 0
    for variant in asked:
        fewer = batches_of(variant, settings)
        total += settings.updates + (fewer if fewer != settings.updates else 0)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("batches", total=total)
        found = compare(settings, corpus, asked, lambda: progress.advance(task))
    if output:
        from paci_schedule.rehearse.curves import draw

        draw(found, settings, output)
    if as_json:
        runs = [{"equal_tokens": each.equal_tokens.facts(), "equal_time": each.equal_time.facts()} for each in found]
        print_json({"settings": asdict(settings), "runs": runs})
    else:
        screen().print(_table(found))


def _device(name: str) -> Any:
    """The torch device of this name; it is tried out."""
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device={name!r}: cannot be used ({reason}); take cpu, or a device of this machine"
        ) from None


def _table(found: Sequence[Any]) -> Table:
    """A row for each `rehearse.comparison.Comparison`."""
    columns = "schedule", "prediction", "updates", "validation loss", "in equal time", "validation loss", "drift"
    table = Table(*columns, box=None)
    for each in found:
        whole, part = each.equal_tokens, each.equal_time
        losses = (f"{trial.validation:.4f}" for trial in (whole, part))
        counts = (f"{trial.updates:,}" for trial in (whole, part))
        cells = [cell for pair in zip(counts, losses, strict=True) for cell in pair]
        table.add_row(whole.variant.schedule, whole.variant.when, *cells, str(max(whole.drift)))
    return table

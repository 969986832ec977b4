"""`paci plan`: find the fastest pipeline of a model on a given number of devices."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from paci_schedule.adapters.choice import IN_EVERY_LOOP
from paci_schedule.cli.options import json_option
from paci_schedule.cli.printing import print_json, screen
from paci_schedule.core.schedules.registry import SCHEDULES
from paci_schedule.errors import ConfigError, nearest
from paci_schedule.plan.search import Job, Row, calibrated, search
from paci_schedule.plan.settings import deepspeed_config, megatron_flags, pipeline_module
from paci_schedule.plan.transformer import built_in, from_config, from_layers, load_config

__all__ = ["plan_"]


_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command("plan")
@click.option(
    "--model",
    metavar="NAME",
    help="A Hugging Face config: a built-in size, a config.json, a model type, or a name on the hub.",
)
@click.option(
    "--layers", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="A JSON file of measured layers."
)
@click.option("--devices", type=int, required=True, metavar="N", help="Number of devices.")
@click.option("--memory", type=_POSITIVE, required=True, metavar="GIB", help="Memory of one device.")
@click.option(
    "--global-batch", type=int, required=True, metavar="G", help="Number of sequences in an optimizer update."
)
@click.option(
    "--sequence-length", type=click.IntRange(1), metavar="TOKENS", help="Tokens in a sequence (default: the longest)."
)
@click.option(
    "--tflops",
    type=_POSITIVE,
    default=100.0,
    metavar="T",
    help="Tera operations that a device really does in a second (default 100).",
)
@click.option(
    "--measured",
    type=float,
    metavar="RATE",
    help="Samples per second and device that 1f1b reached with --stages and --micro-batch-size; replaces --tflops.",
)
@click.option(
    "--bandwidth",
    type=_POSITIVE,
    default=float("inf"),
    metavar="GB",
    help="Gigabytes that a link carries in a second (default: no limit).",
)
@click.option("--latency", type=float, default=0.0, metavar="SECONDS", help="Latency of a message (default 0).")
@click.option("--zero", type=int, default=1, metavar="STAGE", help="ZeRO stage of the optimizer, 0 or 1 (default 1).")
@click.option(
    "--max-drift",
    type=int,
    default=1,
    metavar="D",
    help="The most updates between a forward and its backward (default 1).",
)
@click.option("--schedule", "schedules", multiple=True, metavar="NAME", help="Search only these; can be repeated.")
@click.option("--stages", type=int, multiple=True, metavar="P", help="Search only these; can be repeated.")
@click.option(
    "--micro-batch-size", "sizes", type=int, multiple=True, metavar="S", help="Search only these; can be repeated."
)
@click.option(
    "--recompute", type=click.Choice(["none", "full", "both"]), default="both", help="Which to search (default both)."
)
@click.option(
    "--prediction",
    default="off",
    metavar="WHEN",
    help="When paci predicts weights for stale forwards: off, window, every, or k for every k-th (default off).",
)
@click.option(
    "--top",
    type=click.IntRange(1),
    default=10,
    metavar="N",
    help="Number of rows to print of those that can run (default 10).",
)
@json_option
def plan_(
    model: str | None,
    layers: Path | None,
    sequence_length: int | None,
    tflops: float,
    measured: float | None,
    memory: float,
    bandwidth: float,
    schedules: Sequence[str],
    sizes: Sequence[int],
    recompute: str,
    prediction: str,
    top: int,
    as_json: bool,
    **given: Any,
) -> None:
    """Search for the fastest pipeline of a model.

    The search covers stages, micro-batch size, accumulation, schedule and recomputation.

    If no pipeline can run, the exit code is 1.
    """
    if model is not None and layers is None:
        shape = from_config(_config(model), sequence_length)
    elif layers is not None and model is None:
        if sequence_length:
            raise ConfigError(
                f"sequence_length={sequence_length}: the layers were measured at the file's; leave it out"
            )
        shape = from_layers(layers)
    else:
        raise ConfigError("the model is missing or given twice: give either --model NAME or --layers FILE")
    job = Job(
        model=shape,
        memory=memory * 2**30,
        flops=1.0 if shape.measured else tflops * 1e12,
        bandwidth=bandwidth * 1e9,
        schedules=schedules or tuple(SCHEDULES),
        micro_batch_sizes=sizes,
        recompute={"none": (False,), "full": (True,), "both": (False, True)}[recompute],
        prediction=int(prediction) if prediction.isdecimal() else prediction,
        **given,
    )
    if measured is not None:
        job = calibrated(job, measured)
    rows = search(job)
    best = next((row for row in rows if not row.refused and row.schedule in IN_EVERY_LOOP), None)
    if as_json:
        flags, refused = _megatron(job, best) if best else ([], "")
        settings = best and {
            "row": asdict(best),
            "deepspeed": deepspeed_config(job, best),
            "pipeline_module": pipeline_module(best),
            "megatron": flags or None,
            "megatron_refused": refused,
        }
        print_json({"parameters": shape.parameters, "rows": [asdict(row) for row in rows], "settings": settings})
    else:
        _print_plan(job, rows, best, top)
    if all(row.refused for row in rows):
        raise click.exceptions.Exit(1)


def _print_plan(job: Job, rows: Sequence[Row], best: Row | None, top: int) -> None:
    """Print the `top` fastest rows, an example of every reason to refuse one, and the settings of the best row."""
    console = screen()
    console.print(
        f"{job.model.parameters / 1e9:.2f} B parameters, {len(job.model.layers)} layers, {job.devices} devices, "
        f"{job.global_batch} sequences of {job.model.sequence_length} tokens an update"
    )
    running = [row for row in rows if not row.refused]
    table = Table(
        "schedule",
        "stages x replicas",
        "size x accum.",
        "recompute",
        "tokens/s",
        "samples/s/device",
        "vs 1f1b",
        "GiB",
        "drift",
        box=None,
    )
    for row in running[:top]:
        table.add_row(
            *_place(row),
            f"{row.tokens_per_second:,.0f}",
            f"{row.samples_per_second_per_device:.4g}",
            f"{round(row.speedup, 9):.3f}" if row.speedup else "",
            f"{row.memory / 2**30:.1f}",
            str(row.drift),
        )
    console.print(table if running else "No pipeline can run; raise --memory, --max-drift or --global-batch.")
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in rows[len(running) :]:
        reasons.setdefault((row.schedule, re.sub(r"[\d.]+", "#", row.refused)), []).append(row)
    if reasons:
        console.print(f"\n{len(rows) - len(running)} of {len(rows)} rows refused; the first for each reason:")
        refused = Table(
            "schedule", "stages x replicas", "size x accum.", "recompute", "rows", "refused because", box=None
        )
        for like in reasons.values():
            refused.add_row(*_place(like[0]), str(len(like)), like[0].refused)
        console.print(refused)
    if best and best.predictions:
        click.echo(
            f"\nPredictions an update on the first stage: {best.predictions}. Each computes as long as its optimizer's "
            "step, which the plan leaves out; it counts only what replicas gather for them."
        )
    if best:
        module = ", ".join(f"{key}={value}" for key, value in pipeline_module(best).items())
        flags, refused = _megatron(job, best)
        click.echo(
            f"\nThe fastest that runs with paci_schedule: {best.schedule}\n"
            f"DeepSpeed  {json.dumps(deepspeed_config(job, best))}\n"
            f"           paci_schedule.adapters.deepspeed.CutPipelineModule(layers, {module})\n"
            f"Megatron   {' '.join(flags) or f'cannot run it: {refused}'}"
        )


def _megatron(job: Job, row: Row) -> tuple[list[str], str]:
    """Megatron-LM's flags of a row; if it cannot run the row, none, and the reason."""
    try:
        return megatron_flags(job, row), ""
    except ConfigError as error:
        return [], str(error)


def _place(row: Row) -> tuple[str, str, str, str]:
    return (
        row.schedule,
        f"{row.stages} x {row.replicas}",
        f"{row.micro_batch_size} x {row.accumulation}",
        "full" if row.recompute else "none",
    )


def _config(name: str) -> dict[str, Any]:
    """The config of a model: a built-in one, a file, the default of a type in transformers, or one on the hub."""
    config = load_config(name)
    if config is not None:
        return config
    try:
        from transformers import CONFIG_MAPPING

        found = CONFIG_MAPPING[name]() if name in CONFIG_MAPPING else _on_the_hub(name)
        return found.get_text_config().to_dict()
    except (
        Exception
    ) as error:  # of transformers, the hub's client or its transport: any of them may find that there is none
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model={name!r}: not a built-in size ({nearest(name, built_in())}), no file, no type in transformers, and "
            f"not on the hub ({reason}); give a config.json"
        ) from None


def _on_the_hub(name: str) -> Any:
    """The PretrainedConfig of a model on the Hugging Face hub, or the copy of it on this machine."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except OSError:
        # Asked once: from_pretrained asks for half a minute where there is no network.
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
        return AutoConfig.from_pretrained(name)

"""`paci plan`: the fastest pipeline of a model on so many devices."""

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
from paci_schedule.plan.search import Job, Row, calibrated, deepspeed_config, megatron_flags, pipeline_module, plan
from paci_schedule.plan.transformer import built_in, from_config, from_layers, load_config

__all__ = ["plan_"]


_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command("plan")
@click.option(
    "--model", metavar="NAME", help="A Hugging Face config: a size of ours, a config.json, a type, a name on the hub."
)
@click.option(
    "--layers", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Measured layers (JSON)."
)
@click.option("--devices", type=int, required=True, metavar="N", help="How many devices.")
@click.option("--memory", type=_POSITIVE, required=True, metavar="GIB", help="Of one device.")
@click.option("--global-batch", type=int, required=True, metavar="G", help="Sequences of an update.")
@click.option("--sequence-length", type=click.IntRange(1), metavar="TOKENS", help="Of a sequence (the longest).")
@click.option(
    "--tflops", type=_POSITIVE, default=100.0, metavar="T", help="What a device really does in a second (100)."
)
@click.option(
    "--measured",
    type=float,
    metavar="RATE",
    help="Samples a second and device of 1f1b with --stages and --micro-batch-size: how fast the devices really are.",
)
@click.option(
    "--bandwidth", type=_POSITIVE, default=float("inf"), metavar="GB", help="Of a link in a second (no limit)."
)
@click.option("--latency", type=float, default=0.0, metavar="SECONDS", help="Of a message (0).")
@click.option("--zero", type=int, default=1, metavar="STAGE", help="ZeRO stage of the optimizer, 0 or 1 (1).")
@click.option("--max-drift", type=int, default=1, metavar="D", help="Updates between a forward and its backward (1).")
@click.option("--schedule", "schedules", multiple=True, metavar="NAME", help="Only these; can be repeated.")
@click.option("--stages", type=int, multiple=True, metavar="P", help="Only these; can be repeated.")
@click.option("--micro-batch-size", "sizes", type=int, multiple=True, metavar="S", help="Only these; can be repeated.")
@click.option("--recompute", type=click.Choice(["none", "full", "both"]), default="both", help="Search which (both).")
@click.option(
    "--prediction",
    default="off",
    metavar="WHEN",
    help="Of paci's weights for stale forwards: off, window, every, or a number k for every k-th (off).",
)
@click.option("--top", type=click.IntRange(1), default=10, metavar="N", help="Rows to print of those that run (10).")
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
    **given: object,
) -> None:
    """Search for the fastest pipeline of a model.

    It is a choice of stages, micro-batch size, accumulation, schedule and recomputation.

    Exit code 1 where none can run.
    """
    if (model is None) == (layers is None):
        raise ConfigError("the model is missing or there twice: give either --model NAME or --layers FILE")
    if layers and sequence_length:
        raise ConfigError(f"sequence_length={sequence_length}: the layers were measured at the file's; leave it out")
    shape = from_config(_config(model), sequence_length) if layers is None else from_layers(layers)
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
    rows = plan(job)
    best = next((row for row in rows if not row.refused and row.schedule in IN_EVERY_LOOP), None)
    if as_json:
        settings = best and {
            "row": asdict(best),
            "deepspeed": deepspeed_config(job, best),
            "pipeline_module": pipeline_module(best),
            "megatron": megatron_flags(job, best),
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
            "step, which is not in the plan; that replicas gather weights for it is."
        )
    if best:
        module = ", ".join(f"{key}={value}" for key, value in pipeline_module(best).items())
        click.echo(
            f"\nThe fastest that runs with paci_schedule: {best.schedule}\n"
            f"DeepSpeed  {json.dumps(deepspeed_config(job, best))}\n"
            f"           PipelineModule({module})\n"
            f"Megatron   {' '.join(megatron_flags(job, best))}"
        )


def _place(row: Row) -> tuple[str, str, str, str]:
    return (
        row.schedule,
        f"{row.stages} x {row.replicas}",
        f"{row.micro_batch_size} x {row.accumulation}",
        "full" if row.recompute else "none",
    )


def _config(name: str) -> dict[str, object]:
    """The config of a model by name or file: ours, a type's default in transformers, or one on the Hugging Face hub."""
    config = load_config(name)
    if config is not None:
        return config
    try:
        from transformers import CONFIG_MAPPING

        found = CONFIG_MAPPING[name]() if name in CONFIG_MAPPING else _on_the_hub(name)
        return found.get_text_config().to_dict()
    except Exception as error:  # of transformers, the hub's client or its transport: whichever says that there is none
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model={name!r}: not a size of ours ({nearest(name, built_in())}), no file, no type in transformers, and "
            f"not on the hub ({reason}); give a config.json"
        ) from None


def _on_the_hub(name: str) -> Any:
    """The PretrainedConfig of a model on the Hugging Face hub, or of its copy here."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except OSError:
        # Asked once: from_pretrained asks for half a minute where there is no network.
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
        return AutoConfig.from_pretrained(name)

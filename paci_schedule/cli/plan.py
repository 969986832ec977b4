"""`paci plan`: find the fastest pipeline of a model on a given number of devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import Any

import click

from paci_schedule.cli.models import config_of
from paci_schedule.cli.options import json_option
from paci_schedule.cli.plan_text import Settings, print_plan, settings_of
from paci_schedule.cli.printing import print_json
from paci_schedule.errors import ConfigError
from paci_schedule.plan.hardware import Device, preset, presets
from paci_schedule.plan.job import Job
from paci_schedule.plan.models import Model, from_layers
from paci_schedule.plan.search import calibrated, search
from paci_schedule.plan.settings import pipeline_module
from paci_schedule.plan.transformer import from_config
from paci_schedule.simulate.costs import check_amount

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
@click.option(
    "--gpu",
    metavar="NAME",
    help=f"Take speed, memory and links of a device: {', '.join(presets())}; options below replace single figures.",
)
@click.option(
    "--memory", type=_POSITIVE, metavar="GIB", help="Memory of one device for tensors (with --gpu: less a reserve)."
)
@click.option(
    "--global-batch", type=int, required=True, metavar="G", help="Number of sequences in an optimizer update."
)
@click.option(
    "--sequence-length", type=click.IntRange(1), metavar="TOKENS", help="Tokens in a sequence (default: the longest)."
)
@click.option(
    "--tflops",
    type=_POSITIVE,
    metavar="T",
    help="Tera operations that a device really does in a second (default 100 without --gpu).",
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
    metavar="GB",
    help="Gigabytes that every link carries in a second (default without --gpu: no limit).",
)
@click.option(
    "--latency", type=float, metavar="SECONDS", help="Latency of a message on every link (default without --gpu: 0)."
)
@click.option(
    "--attention",
    type=click.Choice(["fused", "unfused"]),
    default="fused",
    help="Whether the attention keeps its scores, as an unfused one does (default fused).",
)
@click.option(
    "--tied/--untied", default=None, help="Whether the head shares the embedding's weight, whatever the config says."
)
@click.option("--zero", type=int, default=1, metavar="STAGE", help="ZeRO stage of the optimizer, 0 or 1 (default 1).")
@click.option(
    "--overlap-grad-reduce",
    "overlap",
    is_flag=True,
    help="Replicas reduce their gradients during the last backward (Megatron's option of this name).",
)
@click.option(
    "--tensor-parallel",
    "slices",
    type=int,
    multiple=True,
    default=(1,),
    metavar="T",
    help="Search these degrees of tensor parallelism; can be repeated (default 1).",
)
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
    measured: float | None,
    schedules: Sequence[str],
    sizes: Sequence[int],
    recompute: str,
    prediction: str,
    top: int,
    as_json: bool,
    **given: Any,
) -> None:
    """Search for the fastest pipeline of a model.

    The search covers stages, replicas, micro-batch size, accumulation, schedule, recomputation and, where asked for,
    tensor parallelism.

    If no pipeline can run, the exit code is 1.
    """
    shape = _model(model, layers, {name: given.pop(name) for name in ("sequence_length", "attention", "tied")})
    names = "gpu", "memory", "tflops", "bandwidth", "latency"
    job = Job(
        model=shape,
        device=_device(shape, **{name: given.pop(name) for name in names}),
        **({"schedules": schedules} if schedules else {}),
        micro_batch_sizes=sizes,
        recompute={"none": (False,), "full": (True,), "both": (False, True)}[recompute],
        prediction=int(prediction) if prediction.isdecimal() else prediction,
        **given,
    )
    if measured is not None:
        job = calibrated(job, measured)
    rows = search(job)
    if as_json:
        found = {"parameters": shape.parameters, "rows": [asdict(row) for row in rows]}
        print_json(found | {"settings": {name: _as_json(each) for name, each in settings_of(job, rows).items()}})
    else:
        print_plan(job, rows, top)
    if all(row.refused for row in rows):
        raise click.exceptions.Exit(1)


def _as_json(settings: Settings) -> dict[str, Any]:
    row = settings.row
    if row is None:
        return {"refused": settings.refused}
    return {"row": asdict(row), "settings": settings.settings, "pipeline_module": pipeline_module(row)}


def _model(name: str | None, file: Path | None, given: dict[str, Any]) -> Model:
    """The model, from its config or from the file of its measured layers."""
    if name is not None and file is None:
        shape = from_config(config_of(name), given["sequence_length"], given["tied"])
        return replace(shape, fused_attention=given["attention"] == "fused")
    if file is None or name is not None:
        raise ConfigError("the model is missing or given twice: give either --model NAME or --layers FILE")
    if given["sequence_length"]:
        raise ConfigError(
            f"sequence_length={given['sequence_length']}: the layers were measured at the file's; leave it out"
        )
    return from_layers(file)


def _device(
    model: Model,
    gpu: str | None,
    memory: float | None,
    tflops: float | None,
    bandwidth: float | None,
    latency: float | None,
) -> Device:
    """The devices, from the preset and what replaces parts of it."""
    if model.measured and (tflops is not None):
        raise ConfigError(f"tflops={tflops:g}: the layers' times were measured, so it has no effect; leave it out")
    if gpu is None and memory is None:
        raise ConfigError("memory is missing: give --memory GIB, or --gpu NAME")
    check_amount("latency", latency or 0.0)
    if latency is not None and latency >= 1:
        raise ConfigError(f"latency={latency:g}: is in seconds, and no link takes so many; 20 us are 2e-5")
    known = preset(gpu) if gpu is not None else Device(memory=inf)
    if memory is not None:
        known = replace(known, memory=memory * 2**30)
    if model.measured:
        known = replace(known, flops=1.0, saturation=0.0, memory_bandwidth=inf)
    elif tflops is not None or gpu is None:
        known = replace(known, flops=(100.0 if tflops is None else tflops) * 1e12)
    changes = {"bandwidth": bandwidth and bandwidth * 1e9, "latency": latency}
    changes = {name: value for name, value in changes.items() if value is not None}
    return replace(known, inside=replace(known.inside, **changes), between=replace(known.between, **changes))

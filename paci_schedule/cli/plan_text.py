"""A plan as text: the rows that are worth a line, why others are refused, and the settings of those to run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import click
from rich.table import Table

from paci_schedule.adapters.choice import IN_EVERY_LOOP
from paci_schedule.cli.printing import screen
from paci_schedule.errors import ConfigError
from paci_schedule.plan.job import DATA_PARALLEL, Job, Row
from paci_schedule.plan.ranking import SLOWER, lines
from paci_schedule.plan.settings import deepspeed_config, megatron_flags, pipeline_module

__all__ = ["Settings", "print_plan", "settings_of"]

_GIB = 2**30
_SetT = TypeVar("_SetT")


class Settings(NamedTuple):
    """What a framework runs: a row with its settings; or none, and why the best row cannot be run."""

    row: Row | None
    settings: Any
    refused: str = ""


def settings_of(job: Job, rows: Sequence[Row]) -> dict[str, Settings]:
    """The first of the ranked rows that each framework can run with this package."""
    ours = [row for row in rows if not row.refused and row.schedule in (*IN_EVERY_LOOP, DATA_PARALLEL)]
    return {"deepspeed": _first(job, ours, deepspeed_config), "megatron": _first(job, ours, megatron_flags)}


def _first(job: Job, rows: Sequence[Row], settings: Callable[[Job, Row], _SetT]) -> Settings:
    reasons = []
    for row in rows:
        try:
            return Settings(row, settings(job, row))
        except ConfigError as error:
            reasons.append(str(error))
    return Settings(None, None, (reasons or ["no row of a schedule that it runs"])[0])


def print_plan(job: Job, rows: Sequence[Row], top: int) -> None:
    """Print the `top` best lines, an example of every reason to refuse a row, and the settings for each framework."""
    console = screen()
    console.print(
        f"{job.model.parameters / 1e9:.2f} B parameters, {job.model.count} layers, {job.devices} devices with "
        f"{job.device.usable / _GIB:.1f} GiB for tensors, {job.global_batch} sequences of "
        f"{job.model.sequence_length} tokens an update"
    )
    table = Table(
        "schedule", "stages x replicas", *["x slices"] * _sliced(rows), "size x accum.", "recompute", box=None
    )
    for title in ("slack", "tokens/s", "samples/s/device", "vs 1f1b", "vs zb", "GiB", "drift", "drifted"):
        table.add_column(title)
    shown = lines(rows)
    for alike in shown[:top]:
        row = alike[0]
        table.add_row(
            ", ".join(each.schedule for each in alike),
            *_place(row, _sliced(rows)),
            str(sum(row.extra_in_flight)) if row.extra_in_flight else "",
            f"{row.tokens_per_second:,.0f}",
            f"{row.samples_per_second_per_device:.4g}",
            *(f"{round(ratio, 9):.3f}" if ratio else "" for ratio in (row.against_1f1b, row.against_zero_bubble)),
            f"{row.memory / _GIB:.1f}",
            str(row.drift),
            f"{row.drifted:.0%}",
        )
    console.print(table if shown else "No pipeline can run; raise --memory, --max-drift or --global-batch.")
    _print_refused(rows)
    _print_settings(job, rows)


def _print_refused(rows: Sequence[Row]) -> None:
    """Print the first row for each reason to refuse one."""
    refused = [row for row in rows if row.refused and not row.refused.startswith(SLOWER)]
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in refused:
        reasons.setdefault((row.schedule, re.sub(r"[\d.]+", "#", row.refused)), []).append(row)
    if not reasons:
        return
    console = screen()
    console.print(f"\n{len(refused)} of {len(rows)} rows refused; the first for each reason:")
    sliced = _sliced(rows)
    table = Table("schedule", "stages x replicas", *["x slices"] * sliced, "size x accum.", "recompute", box=None)
    table.add_column("rows")
    table.add_column("refused because")
    for like in reasons.values():
        table.add_row(like[0].schedule, *_place(like[0], sliced), str(len(like)), like[0].refused)
    console.print(table)


def _print_settings(job: Job, rows: Sequence[Row]) -> None:
    for framework, (row, settings, refused) in settings_of(job, rows).items():
        name = {"deepspeed": "DeepSpeed", "megatron": "Megatron"}[framework]
        if row is None:
            click.echo(f"\n{name}: cannot run it: {refused}")
            continue
        click.echo(f"\n{name}: {row.schedule}, {' '.join(_place(row, row.slices > 1))}")
        if row.predictions:
            click.echo(
                f"Predictions an update on the first stage: {row.predictions}. Each computes as long as its "
                "optimizer's step, which the plan leaves out; it counts only what replicas gather for them."
            )
        if framework == "deepspeed":
            module = ", ".join(f"{key}={value}" for key, value in pipeline_module(row).items())
            click.echo(f"{json.dumps(settings)}\npaci_schedule.adapters.deepspeed.CutPipelineModule(layers, {module})")
        else:
            click.echo(" ".join(settings))


def _sliced(rows: Sequence[Row]) -> bool:
    return any(row.slices > 1 for row in rows)


def _place(row: Row, sliced: bool) -> list[str]:
    return [
        f"{row.stages} x {row.replicas}",
        *[f"x {row.slices}"] * sliced,
        f"{row.micro_batch_size} x {row.accumulation}",
        "full" if row.recompute else "none",
    ]

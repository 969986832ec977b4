"""The options that several commands share: the pipeline, its costs, and where the output goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.schedules.registry import SCHEDULES, schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError
from paci_schedule.simulate.costs import Costs, check_amount
from paci_schedule.simulate.slack import least_slack

__all__ = [
    "at_least_one",
    "costs_options",
    "jobs",
    "json_option",
    "output_option",
    "pipeline_options",
    "shape_of",
    "slack_option",
    "variant_options",
    "width_option",
]

_MOST = 100_000  # stages, micro-batches, batches


_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Numbers(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]: click before 8.3 takes none
    """A number, or numbers separated by commas: one for each stage (or link)."""

    name = "NUMBER[,NUMBER...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | list[float]:
        if not isinstance(value, str):
            return value
        try:
            numbers = [float(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a number, nor numbers separated by commas", param, ctx)
        return numbers if len(numbers) > 1 else numbers[0]


class _Slack(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """A whole number, or whole numbers separated by commas: one for each link."""

    name = "COUNT[,COUNT...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, ...]:
        if not isinstance(value, str):
            return value
        try:
            counts = [int(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a whole number, nor whole numbers separated by commas", param, ctx)
        return tuple(counts) if len(counts) > 1 else counts[0]


class _Pair(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """An index and a number with a colon between them."""

    name = "INDEX:NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        try:
            index, number = str(value).split(":")
            return int(index), float(number)
        except ValueError:
            self.fail(f"{value!r} is not an index and a number with a colon between, such as 3:1.5", param, ctx)


def _several(*options: _Decorator) -> _Decorator:
    """One decorator that applies all of these options."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

output_option = click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a picture: .svg, .png, .gif (moving), .txt, or .json for a Chrome trace (ui.perfetto.dev).",
)

width_option = click.option(
    "--width",
    type=click.IntRange(1),
    metavar="CHARACTERS",
    help="Width at which lines are cut off (default: the terminal's).",
)

variant_options = _several(
    click.option(
        "--chunks", type=int, metavar="V", help="Model chunks on each stage (only interleaved-1f1b; default 2)."
    ),
    click.option(
        "--cut", type=click.Choice(["lagging", "leading"]), help="Where a call of PACI returns (default lagging)."
    ),
    click.option(
        "--extra-in-flight",
        type=_Slack(),
        default=0,
        metavar="K[,K...]",
        help="Rounds of slack on the links together, or with commas on each link (only paci; default 0).",
    ),
)

pipeline_options = _several(
    click.option("--schedule", "name", required=True, metavar="NAME[,NAME...]", help=", ".join(SCHEDULES) + "."),
    click.option("--stages", type=int, required=True, metavar="P", help="Number of pipeline stages."),
    click.option("--micro-batches", type=int, required=True, metavar="M", help="Number of micro-batches in a batch."),
    variant_options,
)

slack_option = click.option(
    "--suggest-slack", is_flag=True, help="Take the least --extra-in-flight that hides the links (only paci)."
)

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}  # in seconds

costs_options = _several(
    click.option(
        "--forward",
        type=_Numbers(),
        default=1.0,
        metavar="F",
        help="Time of a forward (default 1); with commas, one time for each stage.",
    ),
    click.option(
        "--backward",
        type=_Numbers(),
        default=2.0,
        metavar="B",
        help="Time of the whole backward (default 2), or only of its input half if --weight is given.",
    ),
    click.option("--weight", type=_Numbers(), metavar="W", help="Time of the weight half of the backward."),
    click.option("--step", type=_Numbers(), default=0.0, metavar="S", help="Time of an optimizer update (default 0)."),
    click.option(
        "--latency",
        type=_Numbers(),
        default=0.0,
        metavar="L",
        help="Latency of a message (default 0); with commas, one for each link.",
    ),
    click.option(
        "--bandwidth",
        type=float,
        default=float("inf"),
        metavar="BYTES",
        help="Bytes that a link carries in a second (default: no limit); needs --unit.",
    ),
    click.option(
        "--unit",
        type=click.Choice(list(_UNITS)),
        help="The unit of all times, which --bandwidth has to know; without it any unit will do.",
    ),
    click.option(
        "--message-bytes",
        type=float,
        default=0.0,
        metavar="BYTES",
        help="Size of one activation or gradient (default 0).",
    ),
    click.option(
        "--jitter", type=float, default=0.0, metavar="J", help="Coefficient of variation of F, B and W (default 0)."
    ),
    click.option(
        "--seed", type=int, default=0, metavar="N", help="Seed of the random numbers behind --jitter (default 0)."
    ),
    click.option(
        "--sync",
        type=float,
        metavar="C",
        help="Time of a collective over all stages after every call (default: no collective).",
    ),
    click.option(
        "--straggler",
        type=_Pair(),
        multiple=True,
        metavar="STAGE:FACTOR",
        help="Multiply the times of a stage by a factor; can be repeated.",
    ),
    click.option(
        "--slow-link",
        type=_Pair(),
        multiple=True,
        metavar="LINK:LATENCY",
        help="Set the latency of one link; link 0 is between stages 0 and 1; can be repeated.",
    ),
)


def jobs(options: dict[str, Any]) -> list[tuple[Schedule, PipelineSpec, Costs]]:
    """The schedules, each with the pipeline and the costs that the options describe.

    Of several schedules, each gets only those of --chunks, --cut, --extra-in-flight and --suggest-slack that it takes.
    """
    suggested = options.pop("suggest_slack")
    shape = {key: options.pop(key) for key in ("stages", "micro_batches", "chunks", "cut", "extra_in_flight")}
    if suggested and shape["extra_in_flight"]:
        raise ConfigError(
            f"extra_in_flight={shape['extra_in_flight']}: --suggest-slack chooses it; give one of the two"
        )
    names, found = options.pop("name").split(","), []
    for name in names:
        own = dict(shape)
        if len(names) > 1:
            takes = schedule(name).options
            own["chunks"] = shape["chunks"] if "chunks" in takes else None
            own["cut"] = shape["cut"] if "leading" in takes else None
            own["extra_in_flight"] = shape["extra_in_flight"] if "extra_in_flight" in takes else 0
        chosen, spec = shape_of(name, **own)
        costs = _costs_for(spec, dict(options))
        if suggested and (len(names) == 1 or "extra_in_flight" in chosen.options):
            spec = replace(spec, extra_in_flight=least_slack(chosen, spec, costs))
        found.append((chosen, spec, costs))
    return found


def _costs_for(spec: PipelineSpec, options: dict[str, Any]) -> Costs:
    """The costs that the options of `costs_options` describe."""
    stragglers, slow_links = options.pop("straggler"), options.pop("slow_link")
    for name in ("forward", "backward", "weight"):
        if options[name] is not None:
            options[name] = _with(
                name, options[name], spec.stages, stragglers, lambda old, factor: old * factor, "straggler"
            )
    options["latency"] = _with(
        "latency", options["latency"], spec.stages - 1, slow_links, lambda old, new: new, "slow_link"
    )
    unit = options.pop("unit")
    if options["bandwidth"] != float("inf"):
        if unit is None:
            raise ConfigError(
                f"bandwidth={options['bandwidth']:g}: is in bytes per second, and the times have no unit; add "
                "--unit s, ms or us, whichever --forward and --backward are in"
            )
        options["bandwidth"] *= _UNITS[unit]
    return Costs(**options)


def _with(
    name: str,
    value: float | list[float],
    count: int,
    changes: Sequence[tuple[int, float]],
    change: Callable[[float, float], float],
    option: str,
) -> float | list[float]:
    """`value` for each of `count` stages or links, changed at the indices in `changes`."""
    if not changes:
        return value
    values: list[float] = list(value) if isinstance(value, list) else [value] * count
    for index, number in changes:
        if not 0 <= index < min(count, len(values)):
            raise ConfigError(
                f"{option}={index}:{number}: there are {count} of them, numbered 0 to {count - 1}; name one of those"
            )
        check_amount(f"{option} {index}", number)
        values[index] = change(values[index], number)
    return values


def shape_of(
    name: str,
    stages: int,
    micro_batches: int,
    chunks: int | None,
    cut: str | None,
    extra_in_flight: int | tuple[int, ...],
) -> tuple[Schedule, PipelineSpec]:
    """The schedule and the pipeline, checked against each other."""
    if cut is not None and "leading" not in schedule(name).options:
        raise ConfigError(f"cut={cut}: {name} returns at the end of every batch; leave it out, or take paci")
    varied = {"chunks": chunks} if chunks is not None else {}
    varied |= {"leading": cut == "leading"} if cut is not None else {}
    for value, option in ((stages, "stages"), (micro_batches, "micro_batches")):
        at_least_one(option, value)
    if max(extra_in_flight if isinstance(extra_in_flight, tuple) else (extra_in_flight,), default=0) > _MOST:
        raise ConfigError(f"extra_in_flight={extra_in_flight}: must be at most {_MOST}")
    chosen = schedule(name, **varied)
    spec = PipelineSpec(stages=stages, accumulation=micro_batches, extra_in_flight=extra_in_flight)
    chosen.check(spec)
    return chosen, spec


def at_least_one(name: str, value: int) -> int:
    if not 1 <= value <= _MOST:
        raise ConfigError(f"{name}={value}: must be a whole number of at least 1, and at most {_MOST}")
    return value

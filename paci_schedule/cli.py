"""The `paci` command: see schedules, check them, simulate them, plan a job, read a recorded run, examine this machine.

Bad input is one line on standard error that names the value, the rule and the remedy, and exit code 2.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from paci_schedule import __version__, grid, trace
from paci_schedule.costs import Costs
from paci_schedule.doctor import examine
from paci_schedule.errors import ConfigError, PaciError, ScheduleError
from paci_schedule.model import built_in, from_config, from_layers, load_config
from paci_schedule.plan import Job, Row, calibrated, deepspeed_config, megatron_flags, plan
from paci_schedule.render import chrome_trace, picture, text
from paci_schedule.report import report
from paci_schedule.schedules.base import Schedule
from paci_schedule.schedules.registry import SCHEDULES, schedule
from paci_schedule.simulate import simulate
from paci_schedule.spec import PipelineSpec
from paci_schedule.timeline import Timeline
from paci_schedule.validate import check_grid, check_schedule

__all__ = ["main"]


class _Numbers(click.ParamType):
    """A number, or numbers separated by commas: one for each stage (or link)."""

    name = "NUMBER[,NUMBER...]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float | list[float]:
        if not isinstance(value, str):
            return value
        try:
            numbers = [float(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a number, nor numbers separated by commas", param, ctx)
        return numbers if len(numbers) > 1 else numbers[0]


class _Pair(click.ParamType):
    """INDEX:NUMBER."""

    name = "INDEX:NUMBER"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        try:
            index, number = str(value).split(":")
            return int(index), float(number)
        except ValueError:
            self.fail(f"{value!r} is not an index and a number with a colon between, such as 3:1.5", param, ctx)


def _options(*options: Callable) -> Callable:
    """One decorator out of several."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_output = click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a picture: .svg, .png, .txt, or .json for a Chrome trace (ui.perfetto.dev).",
)

_pipeline = _options(
    click.option("--schedule", "name", required=True, metavar="NAME[,NAME...]", help=", ".join(SCHEDULES) + "."),
    click.option("--stages", type=int, required=True, metavar="P", help="Pipeline stages."),
    click.option("--micro-batches", type=int, required=True, metavar="M", help="Micro-batches of a batch."),
    click.option("--chunks", type=int, metavar="V", help="Model chunks a stage (interleaved-1f1b; 2)."),
    click.option("--cut", type=click.Choice(["lagging", "leading"]), help="Where a call of PACI returns (lagging)."),
    click.option(
        "--extra-in-flight", type=int, default=0, metavar="K", help="Further micro-batches in flight (paci; 0)."
    ),
)

_costs = _options(
    click.option(
        "--forward", type=_Numbers(), default=1.0, metavar="F", help="Time of a forward; commas: of each stage."
    ),
    click.option(
        "--backward",
        type=_Numbers(),
        default=2.0,
        metavar="B",
        help="Time of the whole backward, or of its input half where --weight is given.",
    ),
    click.option("--weight", type=_Numbers(), metavar="W", help="Time of the weight half of the backward."),
    click.option("--step", type=_Numbers(), default=0.0, metavar="S", help="Time of an optimizer update."),
    click.option("--latency", type=_Numbers(), default=0.0, metavar="L", help="Of a message; commas: of each link."),
    click.option(
        "--bandwidth", type=float, default=float("inf"), metavar="BYTES", help="Of a link, in a unit of time."
    ),
    click.option("--message-bytes", type=float, default=0.0, metavar="BYTES", help="Of one activation or gradient."),
    click.option("--jitter", type=float, default=0.0, metavar="J", help="Coefficient of variation of F, B and W."),
    click.option("--seed", type=int, default=0, metavar="N", help="Which jitter."),
    click.option(
        "--sync", type=float, metavar="C", help="Time of a collective over all stages after every call (none)."
    ),
    click.option("--straggler", type=_Pair(), multiple=True, metavar="STAGE:FACTOR", help="A stage that is slower."),
    click.option(
        "--slow-link", type=_Pair(), multiple=True, metavar="LINK:LATENCY", help="Another latency behind a stage."
    ),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def _paci() -> None:
    """See pipeline schedules, check, simulate and plan them, and read recorded runs."""


@_paci.command()
@_pipeline
@_costs
@click.option("--batches", type=int, default=1, metavar="N", help="Batches to draw (1).")
@click.option("--width", type=int, metavar="CHARACTERS", help="Cut the text off there (the terminal's).")
@_output
@_json
def show(batches: int, width: int | None, output: Path | None, as_json: bool, **options: object) -> None:
    """Draw a schedule: as text, or with --output as a picture.  --json prints the Chrome trace."""
    _at_least_one("batches", batches)
    timelines = {
        f"{chosen.name}, {spec.stages} stages, {spec.accumulation} micro-batches": simulate(
            chosen, spec, costs, batches
        )
        for chosen, spec, costs in _jobs(options)
    }
    if output:
        picture(timelines, output)
    if as_json:
        _print_json(chrome_trace(next(iter(timelines.values()))))
    elif not output:
        console = _console()
        for title, timeline in timelines.items():
            if len(timelines) > 1:
                console.print(title)
            _print_grid(console, timeline, width)


@_paci.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option("--schedule", "name", required=True, metavar="NAME", help=", ".join(SCHEDULES) + ".")
@click.option("--stages", type=int, metavar="P", help="Pipeline stages; of FILE, its lines.")
@click.option("--micro-batches", type=int, required=True, metavar="M", help="Micro-batches of a batch.")
@click.option("--chunks", type=int, metavar="V", help="Model chunks a stage (interleaved-1f1b; 2).")
@click.option("--cut", type=click.Choice(["lagging", "leading"]), help="Where a call of PACI returns (lagging).")
@click.option("--extra-in-flight", type=int, default=0, metavar="K", help="Further micro-batches in flight (paci; 0).")
@click.option("--batches", type=int, default=3, metavar="N", help="Batches to check (3).")
@_json
def check(file: Path | None, stages: int | None, batches: int, as_json: bool, **options: object) -> None:
    """Check a schedule, or with FILE a grid of ops (one line a stage: F0 B0 STEP0) against a schedule's rules.

    Exit code 1 where it breaks one; the op is marked in the grid.
    """
    rows = grid.read(_read(file)) if file else None
    if stages is None and rows is None:
        raise ConfigError("stages is missing: give --stages P, or a FILE with a line a stage")
    chosen, spec = _shape(stages=stages if rows is None or stages is not None else len(rows), **options)
    fault = ""
    try:
        if rows is None:
            check_schedule(chosen, spec, _at_least_one("batches", batches))
        else:
            check_grid(chosen, spec, rows)
    except ScheduleError as error:
        fault = str(error)
    if as_json:
        shape = {"schedule": chosen.name, "stages": spec.stages, "micro_batches": spec.accumulation}
        _print_json({"ok": not fault, "error": fault or None} | shape)
    else:
        click.echo(
            fault
            or f"ok: {file or chosen.name} is a valid {chosen.name} schedule of {spec.stages} stages and "
            f"{spec.accumulation} micro-batches a batch"
        )
    if fault:
        raise click.exceptions.Exit(1)


@_paci.command("simulate")
@_pipeline
@_costs
@click.option(
    "--batches",
    type=int,
    metavar="N",
    help="Batches that makespan, peaks and drift are of (one, and the steady state).",
)
@click.option("--activation-bytes", type=float, default=0.0, metavar="BYTES", help="Of one micro-batch on one stage.")
@click.option("--weight-bytes", type=float, default=0.0, metavar="BYTES", help="Of one stage.")
@_json
def simulate_(
    batches: int | None, activation_bytes: float, weight_bytes: float, as_json: bool, **options: object
) -> None:
    """Simulate a schedule and print its figures.  Times are in the unit of --forward and --backward."""
    found = []
    for chosen, spec, costs in _jobs(options):
        figures = report(chosen, spec, costs, batches, activation_bytes=activation_bytes, weight_bytes=weight_bytes)
        shape = {"schedule": chosen.name, "stages": spec.stages, "micro_batches": spec.accumulation, "batches": batches}
        found.append(shape | asdict(figures))
    if as_json:
        _print_json(found if len(found) > 1 else found[0])
    else:
        _console().print(_comparison(found) if len(found) > 1 else _figures(found[0]))


@_paci.command("plan")
@click.option("--model", metavar="NAME", help="A Hugging Face config: a name, a config.json or its folder.")
@click.option(
    "--layers", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Measured layers (JSON)."
)
@click.option("--devices", type=int, required=True, metavar="N", help="How many devices.")
@click.option("--memory", type=float, required=True, metavar="GIB", help="Of one device.")
@click.option("--global-batch", type=int, required=True, metavar="G", help="Sequences of an update.")
@click.option("--sequence-length", type=int, metavar="TOKENS", help="Of a sequence (the model's longest).")
@click.option("--tflops", type=float, default=100.0, metavar="T", help="What a device really does in a second (100).")
@click.option(
    "--measured",
    type=float,
    metavar="RATE",
    help="Samples a second and device of 1f1b with --stages and --micro-batch-size; instead of --tflops.",
)
@click.option("--bandwidth", type=float, default=float("inf"), metavar="GB", help="Of a link in a second (no limit).")
@click.option("--latency", type=float, default=0.0, metavar="SECONDS", help="Of a message (0).")
@click.option("--zero", type=int, default=1, metavar="STAGE", help="ZeRO stage of the optimizer, 0 or 1 (1).")
@click.option("--max-drift", type=int, default=1, metavar="D", help="Updates between a forward and its backward (1).")
@click.option("--schedule", "schedules", multiple=True, metavar="NAME", help="Only these; can be repeated.")
@click.option("--stages", type=int, multiple=True, metavar="P", help="Only these; can be repeated.")
@click.option("--micro-batch-size", "sizes", type=int, multiple=True, metavar="S", help="Only these; can be repeated.")
@click.option("--recompute", type=click.Choice(["none", "full", "both"]), default="both", help="Search which (both).")
@click.option("--top", type=int, default=10, metavar="N", help="Rows to print of those that run (10).")
@_json
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
    top: int,
    as_json: bool,
    **given: object,
) -> None:
    """Search stages, micro-batch size, accumulation, schedule and recomputation for the fastest pipeline of a model."""
    if (model is None) == (layers is None):
        raise ConfigError("the model is missing or there twice: give either --model NAME or --layers FILE")
    shape = from_config(_config(model), sequence_length) if layers is None else from_layers(layers)
    job = Job(
        model=shape,
        memory=memory * 2**30,
        flops=tflops * 1e12,
        bandwidth=bandwidth * 1e9,
        schedules=schedules or tuple(SCHEDULES),
        micro_batch_sizes=sizes,
        recompute={"none": (False,), "full": (True,), "both": (False, True)}[recompute],
        **given,
    )
    if measured is not None:
        job = calibrated(job, measured)
    rows = plan(job)
    best = next((row for row in rows if not row.refused and row.schedule in ("paci", "1f1b")), None)
    if as_json:
        settings = best and {
            "row": asdict(best),
            "deepspeed": deepspeed_config(job, best),
            "megatron": megatron_flags(job, best),
        }
        _print_json({"parameters": shape.parameters, "rows": [asdict(row) for row in rows], "settings": settings})
        return
    console = _console()
    console.print(
        f"{shape.parameters / 1e9:.2f} B parameters, {len(shape.layers)} layers, {job.devices} devices, "
        f"{job.global_batch} sequences of {shape.sequence_length} tokens an update"
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
            f"{row.speedup:.3f}" if row.speedup else "",
            f"{row.memory / 2**30:.1f}",
            str(row.drift),
        )
    console.print(table)
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
    if best:
        click.echo(
            f"\nThe fastest that runs with paci_schedule: {best.schedule}, PipelineModule(num_stages={best.stages})\n"
            f"DeepSpeed  {json.dumps(deepspeed_config(job, best))}\n"
            f"Megatron   {' '.join(megatron_flags(job, best))}"
        )


def _place(row: Row) -> tuple[str, str, str, str]:
    return (
        row.schedule,
        f"{row.stages} x {row.replicas}",
        f"{row.micro_batch_size} x {row.accumulation}",
        "full" if row.recompute else "none",
    )


@_paci.command("trace")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--last", type=float, metavar="SECONDS", help="Draw only the end of the run.")
@click.option("--width", type=int, metavar="CHARACTERS", help="Cut the text off there (the terminal's).")
@_output
@_json
def trace_(files: Sequence[Path], last: float | None, width: int | None, output: Path | None, as_json: bool) -> None:
    """Read a recorded run (a FILE a stage, or their folder): where the time went, with a simulated run beside it."""
    paths = [path for file in files for path in (sorted(file.glob("*.jsonl")) if file.is_dir() else [file])]
    if not paths:
        raise ConfigError("no trace files: name the files (or the folder of *.jsonl files) that the ranks wrote")
    recordings = trace.merge([trace.read(path) for path in paths])
    recorded, expected = trace.timeline(recordings), trace.simulated(recordings)
    spent = [trace.spent(recording) for recording in recordings]
    if output:
        drawn = {"recorded": _end_of(recorded, last), "simulated": _end_of(expected, last)}
        picture(drawn, output, unit="s")
    if as_json:
        _print_json(
            {
                "stages": len(recordings),
                "makespan": recorded.makespan,
                "simulated_makespan": expected.makespan,
                "spent": spent,
            }
        )
        return
    table = Table("stage", *spent[0], title="Where the time went (s)", box=None, title_justify="left")
    for stage, times in enumerate(spent):
        total = sum(times.values()) or 1.0
        table.add_row(str(stage), *(f"{seconds:.3f} ({seconds / total:4.0%})" for seconds in times.values()))
    console = _console()
    console.print(table)
    console.print(
        f"recorded {recorded.makespan:.3f} s, simulated with the medians of its ops {expected.makespan:.3f} s"
    )
    if output is None:
        for title, drawn in (("recorded", recorded), ("simulated", expected)):
            console.print(title)
            _print_grid(console, _end_of(drawn, last), width)


@_paci.command()
@_json
def doctor(as_json: bool) -> None:
    """Say what is installed and supported and whether each hook exists; exit code 1 if not."""
    findings = list(examine())
    healthy = all(finding.ok for finding in findings if finding.required)
    if as_json:
        _print_json({"ok": healthy, "findings": [finding._asdict() for finding in findings]})
    else:
        table = Table("", "what", "found", box=None)
        for finding in findings:
            mark = "[green]ok[/]" if finding.ok else "[red]missing[/]" if finding.required else "[yellow]no[/]"
            table.add_row(mark, finding.name, finding.detail)
        _console().print(table)
    if not healthy:
        raise click.exceptions.Exit(1)


def _jobs(options: dict[str, object]) -> list[tuple[Schedule, PipelineSpec, Costs]]:
    """The schedules, with the pipeline and the costs that the options of `_pipeline` and `_costs` say.

    Of several schedules each gets those of --chunks, --cut and --extra-in-flight that it has.
    """
    shape = {key: options.pop(key) for key in ("stages", "micro_batches", "chunks", "cut", "extra_in_flight")}
    names, jobs = options.pop("name").split(","), []
    for name in names:
        own = dict(shape)
        if len(names) > 1:
            own["chunks"] = shape["chunks"] if name == "interleaved-1f1b" else None
            own["cut"] = shape["cut"] if name == "paci" else None
            own["extra_in_flight"] = shape["extra_in_flight"] if name == "paci" else 0
        chosen, spec = _shape(name, **own)
        jobs.append((chosen, spec, _costs_for(spec, dict(options))))
    return jobs


def _costs_for(spec: PipelineSpec, options: dict[str, object]) -> Costs:
    """The costs that the options of `_costs` say."""
    stragglers, slow_links = options.pop("straggler"), options.pop("slow_link")
    for name in ("forward", "backward", "weight"):
        if options[name] is not None:
            options[name] = _with(
                name, options[name], spec.stages, stragglers, lambda old, factor: old * factor, "straggler"
            )
    options["latency"] = _with(
        "latency", options["latency"], spec.stages - 1, slow_links, lambda old, new: new, "slow_link"
    )
    return Costs(**options)


def _with(
    name: str,
    value: float | list[float],
    count: int,
    changes: Sequence[tuple[int, float]],
    change: Callable[[float, float], float],
    option: str,
) -> float | list[float]:
    """`value` for all of `count`, changed at the indices of `changes`."""
    if not changes:
        return value
    values = list(value) if isinstance(value, list) else [value] * count
    for index, number in changes:
        if not 0 <= index < min(count, len(values)):
            raise ConfigError(
                f"{option}={index}:{number}: there are {count} of them, 0 to {count - 1}; name one of those"
            )
        values[index] = change(values[index], number)
    return values


def _shape(
    name: str, stages: int, micro_batches: int, chunks: int | None, cut: str | None, extra_in_flight: int
) -> tuple[Schedule, PipelineSpec]:
    """The schedule and the pipeline, checked."""
    varied = {"chunks": chunks} if chunks is not None else {}
    varied |= {"leading": cut == "leading"} if cut is not None else {}
    for value, option in ((stages, "stages"), (micro_batches, "micro_batches")):
        _at_least_one(option, value)
    chosen = schedule(name, **varied)
    spec = PipelineSpec(stages=stages, accumulation=micro_batches, extra_in_flight=extra_in_flight)
    chosen.check(spec)
    return chosen, spec


def _config(name: str) -> dict[str, object]:
    """The config of a model by name or file, from the Hugging Face hub if need be."""
    config = load_config(name)
    if config is not None:
        return config
    try:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(name).to_dict()
    except (ImportError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model={name!r}: none of {', '.join(built_in())}, no file, and not on the hub ({reason}); "
            "give a config.json"
        ) from None


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{name}={value}: must be a whole number of at least 1")
    return value


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"file={str(file)!r}: cannot be read ({error}); name a text file") from None


def _print_grid(console: Console, timeline: Timeline, width: int | None) -> None:
    """Print the timeline as text, cut off at `width`, by default at the terminal's where there is one."""
    fits = width or (console.width if console.is_terminal else None)
    console.print(text(timeline, fits), soft_wrap=True)


def _end_of(timeline: Timeline, seconds: float | None) -> Timeline:
    """The last `seconds` of a timeline; all of it where None."""
    begin = timeline.start if seconds is None else timeline.end - seconds
    return Timeline([[span for span in row if span.start >= begin] for row in timeline.rows])


def _figures(found: dict[str, object]) -> Table:
    """The figures of one schedule."""
    title = f"{found['schedule']}, {found['stages']} stages, {found['micro_batches']} micro-batches"
    table = Table(title=title, show_header=False, box=None, title_justify="left")
    for key, value in found.items():
        if key not in ("schedule", "stages", "micro_batches", "batches") and (
            not isinstance(value, list) or any(value)
        ):
            table.add_row(key.replace("_", " "), _brief(value))
    return table


def _comparison(rows: Sequence[dict[str, object]]) -> Table:
    """The main figures of several schedules, `speed` against the first."""
    table = Table(
        "schedule", "time per micro-batch", "speed", "bubble", "bubble share", "in flight", "drift", "weights", box=None
    )
    for row in rows:
        times = [each["time_per_micro_batch"] for each in (rows[0], row)]
        speed = f"{times[0] / times[1]:.3f}" if times[1] else ""
        figures = f"{times[1]:.6g}", speed, f"{row['bubble']:.6g}", f"{row['bubble_share']:.1%}"
        most = (f"{max(row[key]):g}" for key in ("peak_in_flight", "max_drift", "weight_versions"))
        table.add_row(row["schedule"], *figures, *most)
    return table


def _brief(value: object) -> str:
    """A figure for a table; of many stages the first, the last and the largest."""
    if isinstance(value, list) and isinstance(value[0], dict):
        return _brief(dict(sum((Counter(each) for each in value), Counter()))) + " over all stages"
    if isinstance(value, list):
        if len(value) > 1 and max(value) - min(value) <= 1e-9 * abs(max(value)):
            return f"{_brief(value[0])} on every stage"
        if len(value) > 16:
            return f"{_brief(value[0])} ... {_brief(value[-1])}, at most {_brief(max(value))}"
        return "  ".join(_brief(each) for each in value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {count}" for key, count in sorted(value.items())) + "}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _console() -> Console:
    """Standard output, as wide as the terminal, or wide where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _print_json(value: object) -> None:
    click.echo(json.dumps(value))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with `arguments`, or those of the process, and exit."""
    try:
        code = _paci.main(arguments, prog_name="paci", standalone_mode=False) or 0
    except click.exceptions.Abort:
        code = 130
    except (click.ClickException, PaciError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        shows_help = isinstance(error, click.exceptions.NoArgsIsHelpError)
        context = getattr(error, "ctx", None)
        remedy = f" See `{context.command_path} --help`." if context and not shows_help else ""
        click.echo(message if shows_help else f"paci: {message}{remedy}", err=True)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()

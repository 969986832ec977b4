"""Published measurements of Megatron-LM beside what the planner says of the same jobs.

    python -m benchmarks.published

prints the table of docs/planning.md, and then every job.  The constants of `plan.hardware` and `plan.transformer` were
fitted to the speeds of `FITTED` and to nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from paci_schedule import PipelineSpec
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.plan.hardware import preset
from paci_schedule.plan.job import Job, Row
from paci_schedule.plan.models import load_config
from paci_schedule.plan.partition import evaluate
from paci_schedule.plan.prices import costs_of, memory_of
from paci_schedule.plan.transformer import Transformer, from_config
from paci_schedule.simulate.figures import time_per_micro_batch

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A job that somebody ran, and what it did."""

    name: str
    model: Transformer
    gpu: str
    schedule: str = "1f1b"
    chunks: int = 1
    stages: int
    slices: int = 1
    replicas: int = 1
    size: int
    accumulation: int
    recompute: bool = False
    sharded: bool = False
    """Whether the replicas share the optimizer's states."""

    overlap: bool = False
    shorter_ends: bool = False
    """Whether the first and the last stage have a block less than the others."""

    speed: float
    """Samples a second and device."""

    memory: float = 0.0
    """GiB of the fullest device; 0 where that was not published."""


@dataclass(frozen=True)
class Compared:
    """A measured job and its plan."""

    measured: Measured
    speed: float
    memory: float

    @property
    def error(self) -> float:
        """The planned speed over the measured one, minus 1."""
        return self.speed / self.measured.speed - 1

    @property
    def memory_error(self) -> float:
        """The planned memory over the measured one, minus 1; 0 where none was published."""
        return self.memory / self.measured.memory - 1 if self.measured.memory else 0.0


def compared(measured: Measured) -> Compared:
    """The plan of a measured job."""
    devices = measured.stages * measured.slices * measured.replicas
    batch = measured.replicas * measured.size * measured.accumulation
    job = Job(
        model=measured.model,
        device=preset(measured.gpu),
        devices=devices,
        global_batch=batch,
        zero=int(measured.sharded),
        overlap=measured.overlap,
    )
    options = {"chunks": measured.chunks} if measured.chunks > 1 else {}
    chosen, spec = (
        schedule(measured.schedule, **options),
        PipelineSpec(stages=measured.stages, accumulation=measured.accumulation),
    )
    row = Row(
        schedule=measured.schedule,
        stages=measured.stages,
        replicas=measured.replicas,
        slices=measured.slices,
        micro_batch_size=measured.size,
        accumulation=measured.accumulation,
        recompute=measured.recompute,
    )
    layers = measured.model.layers_on(job.device, measured.size, measured.slices)
    memories = [memory_of(job, chosen, spec, row, stage) for stage in range(measured.stages)]
    partition = evaluate(layers, memories, _bounds(measured), recompute_every=int(measured.recompute))
    seconds = time_per_micro_batch(chosen, spec, costs_of(job, spec, row, layers, partition))
    speed = measured.replicas * measured.size / seconds / devices
    return Compared(measured, speed, max(partition.peak_bytes) / GIB)


def _bounds(measured: Measured) -> list[int]:
    """Where each stage begins and the last one ends: equal blocks, the embedding first, the head last."""
    model, stages = measured.model, measured.stages
    if measured.shorter_ends:
        each = (model.layers + 2) // stages
        return [each * stage for stage in range(stages)] + [model.count]
    return [0, *(1 + model.layers // stages * stage for stage in range(1, stages)), model.count]


# arXiv 2401.10241: A100 80 GB, nodes of 8.  Table 3 has the models and the sizes, and section 5.1 says that the first
# and the last stage have a block less; table 4 has speeds and memory, table 11 those of micro-batches twice as large.
# The example script of the authors' fork, at its tag zero-bubble-v0.1.0, does not ask for flash attention.
_PIPELINES = {  # stages, size, numbers of micro-batches
    "gpt-1.5b": (8, 6, (24, 32, 64)),
    "gpt-6.2b": (8, 3, (24, 32, 64)),
    "gpt-14.6b": (16, 1, (48, 64, 128)),
    "gpt-28.3b": (32, 1, (96, 128, 256)),
}
_TABLE_4 = {
    "1f1b": {
        "gpt-1.5b": (11.8, 12.5, 13.6, 30),
        "gpt-6.2b": (3.50, 3.70, 4.03, 39),
        "gpt-14.6b": (1.40, 1.49, 1.64, 32),
        "gpt-28.3b": (0.76, 0.80, 0.88, 43),
    },
    "interleaved-1f1b": {
        "gpt-1.5b": (13.1, 13.4, 13.9, 40),
        "gpt-6.2b": (4.01, 4.08, 4.19, 48),
        "gpt-14.6b": (1.54, 1.59, 1.66, 39),
        "gpt-28.3b": (0.82, 0.85, 0.90, 58),
    },
    "zb-h1": {
        "gpt-1.5b": (12.9, 13.4, 14.2, 32),
        "gpt-6.2b": (3.88, 4.00, 4.20, 42),
        "gpt-14.6b": (1.61, 1.67, 1.76, 33),
        "gpt-28.3b": (0.87, 0.90, 0.96, 44),
    },
    "zb-h2": {
        "gpt-1.5b": (14.5, 14.8, 14.9, 59),
        "gpt-6.2b": (4.32, 4.35, 4.39, 70),
        "gpt-14.6b": (1.81, 1.83, 1.85, 51),
        "gpt-28.3b": (0.99, 1.00, 1.00, 74),
    },
}
_TABLE_11 = {
    "gpt-1.5b": (12.0, 12.6, 13.8, 57),
    "gpt-6.2b": (3.56, 3.76, 4.09, 66),
    "gpt-14.6b": (1.53, 1.62, 1.78, 50),
    "gpt-28.3b": (0.81, 0.85, 0.94, 72),
}


def _zero_bubble(name: str, published: Sequence[float], times: int = 1, order: str = "1f1b") -> Iterator[Measured]:
    """The rows of a model: one for each number of micro-batches, of `times` the size of table 3."""
    stages, size, accumulations = _PIPELINES[name]
    *speeds, memory = published
    model = replace(from_config(load_config(name) or {}), fused_attention=False)
    each = (model.layers + 2) // stages
    for accumulation, speed in zip(accumulations, speeds, strict=True):
        yield Measured(
            name=name,
            model=model,
            gpu="a100",
            schedule=order,
            chunks=each if order == "interleaved-1f1b" else 1,
            stages=stages,
            size=size * times,
            accumulation=accumulation,
            shorter_ends=True,
            speed=speed,
            memory=memory,
        )


FITTED = [row for name, published in _TABLE_4["1f1b"].items() for row in _zero_bubble(name, published)]
OTHERS_OF_THE_PAPER = [
    *(
        row
        for order, models in _TABLE_4.items()
        if order != "1f1b"
        for name, published in models.items()
        for row in _zero_bubble(name, published, order=order)
    ),
    *(row for name, published in _TABLE_11.items() for row in _zero_bubble(name, published, times=2)),
]

# Megatron-LM's README of April 2021 (images/cases_april2021.png) has the speeds of A100 80 GB in nodes of 8, and
# examples/academic_paper_scripts/sc21/run_table_1.sh all flags: layers, width, heads, degrees of tensor and pipeline
# parallelism, size, batch, nodes, chunks.  Everything was recomputed; the reductions overlapped where DDP was torch's.
_SC21 = {
    "1.7B": (24, 2304, 24, 1, 1, 16, 512, 4, 1, 137),
    "3.6B": (30, 3072, 32, 2, 1, 16, 512, 8, 1, 138),
    "7.5B": (36, 4096, 32, 4, 1, 16, 512, 16, 1, 142),
    "18B": (40, 6144, 48, 8, 1, 8, 1024, 32, 1, 135),
    "39B": (48, 8192, 64, 8, 2, 4, 1536, 64, 1, 138),
    "76B": (60, 10240, 80, 8, 4, 2, 1792, 128, 3, 140),
    "145B": (80, 12288, 96, 8, 8, 2, 2304, 192, 2, 148),
    "310B": (96, 16384, 128, 8, 16, 1, 2160, 240, 2, 155),
    "530B": (105, 20480, 128, 8, 35, 1, 2520, 315, 3, 163),
    "1T": (128, 25600, 160, 8, 64, 1, 3072, 384, 1, 163),
}


def _sc21(name: str) -> Measured:
    layers, hidden, heads, slices, stages, size, batch, nodes, chunks, teraflops = _SC21[name]
    model = replace(
        _transformer(layers, hidden, heads, heads, 51200, 2048),
        biases=True,
        dropout=True,
        positions=2048,
        tied=True,
        fused_attention=False,
    )
    replicas = nodes * 8 // slices // stages
    # What the README counts of a sample: four forwards, of which one is recomputed, and attention in full.
    operations = 96 * 2048 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51200 / (16 * layers * hidden))
    return Measured(
        name=name,
        model=model,
        gpu="a100",
        schedule="interleaved-1f1b" if chunks > 1 else "1f1b",
        chunks=chunks,
        stages=stages,
        slices=slices,
        replicas=replicas,
        size=size,
        accumulation=batch // replicas // size,
        recompute=True,
        overlap=stages == 1,
        speed=teraflops * 1e12 / operations,
    )


def _transformer(
    layers: int, hidden: int, heads: int, key_value_heads: int, vocabulary: int, sequence: int
) -> Transformer:
    return Transformer(
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=key_value_heads,
        head_width=hidden / heads,
        inner=4 * hidden,
        vocabulary=vocabulary,
        sequence=sequence,
        gated=False,
        biases=False,
        dropout=False,
        positions=0,
        tied=False,
    )


SC21 = [_sc21(name) for name in _SC21]

# NVIDIA/dgxc-benchmarking on GitHub: nemotron/README_15b.md, README_340b.md (24.11, H100) and README.md (GB200).
# They name the degrees of parallelism, sizes, chunks and seconds a step; the models are Nemotron-4's.
_NEMOTRON = {
    "15B": _transformer(32, 6144, 48, 8, 256000, 4096),
    "340B": _transformer(96, 18432, 96, 8, 256000, 4096),
}


def _nemotron(name: str, gpu: str, devices: int, stages: int, slices: int, size: int, a: int, step: float) -> Measured:
    replicas = devices // stages // slices
    return Measured(
        name=f"Nemotron-4 {name}, {devices} {gpu}",
        model=_NEMOTRON[name],
        gpu=gpu,
        schedule="interleaved-1f1b" if stages > 1 else "1f1b",
        chunks=12 if stages > 1 else 1,
        stages=stages,
        slices=slices,
        replicas=replicas,
        size=size,
        accumulation=a,
        sharded=True,
        overlap=True,
        speed=replicas * size * a / step / devices,
    )


H100 = [
    *(
        _nemotron("15B", "h100", *row)
        for row in ((16, 1, 4, 4, 4, 2.83), (256, 1, 4, 4, 4, 2.88), (2048, 1, 4, 4, 4, 2.96))
    ),
    *(
        _nemotron("340B", "h100", *row)
        for row in ((128, 8, 8, 1, 16, 4.61), (512, 8, 8, 1, 16, 4.7), (2048, 8, 8, 1, 16, 4.84))
    ),
]
GB200 = [
    _nemotron("340B", "gb200", devices, 4, 8, 1, a, step)
    for devices, a, step in (
        (128, 128, 32.66),
        (256, 64, 16.58),
        (512, 32, 8.468),
        (128, 8, 2.189),
        (256, 8, 2.19),
        (512, 8, 2.229),
    )
]


SOURCES = {
    "arXiv 2401.10241, A100, 1F1B (fitted)": FITTED,
    "the same, other schedules and sizes": OTHERS_OF_THE_PAPER,
    "Megatron-LM's README of 2021, A100": SC21,
    "NVIDIA, H100": H100,
    "NVIDIA, GB200, 32 to 128 micro-batches": GB200[:3],
    "NVIDIA, GB200, 8 micro-batches": GB200[3:],
}


def table(rows: Iterable[Measured]) -> Iterator[str]:
    """The rows beside their plans, in Markdown."""
    yield (
        "| model | schedule | stages x replicas x slices | size x accum. | measured | planned | off | GiB measured "
        "| planned |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in map(compared, rows):
        job = row.measured
        chunks = f", {job.chunks} chunks" if job.chunks > 1 else ""
        memory = f"{job.memory:g}" if job.memory else ""
        yield (
            f"| {job.name} | {job.schedule}{chunks} | {job.stages} x {job.replicas} x {job.slices} "
            f"| {job.size} x {job.accumulation} | {job.speed:.3g} | {row.speed:.3g} | {row.error:+.1%} "
            f"| {memory} | {row.memory:.1f} |"
        )


def summary(name: str, rows: Sequence[Measured]) -> str:
    """A line of a Markdown table: how far the plans are off, from the lowest to the highest."""
    results = [compared(row) for row in rows]
    memory = [row.memory_error for row in results if row.measured.memory]
    return f"| {name} | {len(rows)} | {_range([row.error for row in results])} | {_range(memory) if memory else ''} |"


def _range(errors: Sequence[float]) -> str:
    return f"{min(errors):+.1%} to {max(errors):+.1%}"


def main() -> None:
    sys.stdout.write("| measured by | jobs | speed | memory |\n|---|---|---|---|\n")
    sys.stdout.write("".join(f"{summary(name, rows)}\n" for name, rows in SOURCES.items()) + "\n")
    sys.stdout.write("".join(f"{line}\n" for rows in SOURCES.values() for line in table(rows)))


if __name__ == "__main__":
    main()

"""The line by which a job says, when it starts, that its schedule is on."""

from __future__ import annotations

import torch.distributed as dist

from paci_schedule import __version__
from paci_schedule.adapters.options import Options
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec

__all__ = ["say", "start_line"]


def start_line(
    schedule: Schedule,
    spec: PipelineSpec,
    options: Options,
    *,
    framework: str,
    clip: float | None = None,
    copied_bytes: int = 0,
) -> str:
    """What runs: the schedule, P, a, the bound of the drift, how old the norms are that clip, and the predictions.

    Args:
        schedule: what runs after the updates of `flush_warmup_steps`.
        spec: the pipeline.
        options: of the schedule.
        framework: its name, as a user writes it.
        clip: the norm that gradients are clipped to; 0 for no clipping, None where that is not known.
        copied_bytes: bytes of the first stage's weights that are kept twice while a prediction stands.
    """
    stages = spec.stages
    pipeline = f"P = {_count(stages, 'stage')}, a = {_count(spec.accumulation, 'micro-batch', 'es')} an update"
    parts = [f'paci_schedule {__version__}: {framework} runs the schedule "{schedule.name}" on {pipeline}']
    if stages == 1:
        parts.append("one stage has no bubble, so no schedule makes it faster; a pipeline needs two stages or more")
        return "; ".join(parts)
    if schedule.flushes:
        return "; ".join([*parts, "no drift, as every batch ends with a flush"])
    parts.append(f"drift at most {_count(schedule.drift_bound(spec, 0), 'update')}")
    if clip is not None:
        parts.append(_clipping(spec, options, clip))
    parts.append(_prediction(options, copied_bytes))
    if options.flush_warmup_steps:
        warm_up = _count(options.flush_warmup_steps, "update")
        parts.append(f'a warm-up of {warm_up} under "1f1b" comes first')
    return "; ".join(parts)


def say(line: str) -> None:
    """Print a line on the job's rank 0.  A logger would drop it: by default a logger keeps warnings only."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{plural * (number != 1)}"


def _clipping(spec: PipelineSpec, options: Options, clip: float) -> str:
    if not clip:
        return "no gradient clipping"
    if options.clip == "stage":
        return f"each stage clips to {clip:g} by its own norm"
    age = _count(-(-spec.in_flight(0) // spec.accumulation), "update")  # `CarriedNorms.delay`
    return f"the global norm is clipped to {clip:g}, with norms of other stages that are up to {age} old"


def _prediction(options: Options, copied_bytes: int) -> str:
    if options.prediction == "off":
        return "no prediction"
    reach = f" with a reach of {options.prediction_reach:g}" if options.prediction_reach != 1 else ""
    price = f", which costs stage 0 a copy of its weights, {copied_bytes / 2**20:.1f} MiB" if copied_bytes else ""
    return f"stale forwards run on predicted weights ({options.prediction!r}{reach}){price}"

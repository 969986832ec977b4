"""Whether the host waits for the device in steady state: PyTorch itself raises where it does.

One stage with one replica, as a job of several would: the engine, DeepSpeed's fp32 optimizer and our uploads.  Then the
optimizers that read on the host anyway, whose places are listed.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch

from benchmarks.gpu.place import Failed, Place
from testing import deepspeed_job, jobs
from testing.jobs import Job
from testing.ranks import run_ranks

__all__ = ["run"]

_WARM_UP, _STEADY = 4, 3
_JOBS = {
    "fp32": Job(stages=1, accumulation=3, script=()),
    "bf16": Job(stages=1, accumulation=3, script=(), precision="bf16"),
    "bf16, clipping": Job(stages=1, accumulation=3, script=(), precision="bf16", clip=0.4),
}


def run(place: Place) -> dict[str, Any]:
    """The places where the host waits, by job; raises if there is one in fp32."""
    [waits] = run_ranks(_waits, 1, (list(_JOBS),), timeout=place.seconds - 5)
    figures = {f"waits in {name}": places for name, places in waits.items()}
    if waits["fp32"]:
        raise Failed("in fp32 the host waits for the device", figures)
    return figures


def _waits(names: list[str]) -> dict[str, list[str]]:
    return {name: _places(_JOBS[name]) for name in names}


def _places(job: Job) -> list[str]:
    engine = deepspeed_job.build(job)
    feed = jobs.data(job.model)
    for _ in range(_WARM_UP):
        engine.train_batch(feed)
    with _watched() as told:
        for _ in range(_STEADY):
            engine.train_batch(feed)
    return sorted({f"{warning.filename.rpartition('/')[2]}:{warning.lineno}" for warning in told})


@contextlib.contextmanager
def _watched() -> Any:
    """PyTorch's warnings of synchronising operations, each with the place of the caller."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield told
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
        told[:] = [warning for warning in told if "called a synchronizing" in str(warning.message)]

"""How versions of DeepSpeed differ in what their pipelines compute, under 1F1B too."""

from __future__ import annotations

import functools
from importlib.metadata import version

from packaging.version import Version

from testing.jobs import Job

__all__ = ["knows", "loads_weights_alone", "where_gradients_are_divided"]


def knows(job: Job) -> bool:
    """Whether the reference has the arithmetic of the installed DeepSpeed for a job.

    It has that of the newest.  The optimizers of older ones round a norm of bfloat16 training otherwise when they clip,
    and their BF16_Optimizer skips no overflow.
    """
    differs = job.precision != "fp32" and (job.clip or job.poison is not None)
    return Version(version("deepspeed")) >= Version("0.19.6") or not differs


def loads_weights_alone() -> bool:
    """Whether `load_checkpoint(load_module_only=True)` works in fp32: not before 0.16.5 (change #7133)."""
    return Version(version("deepspeed")) >= Version("0.16.5")


@functools.cache
def where_gradients_are_divided() -> str:
    """By the number of micro-batches to an update: `stage.Stage.divides` of the installed version.

    Sources: DeepSpeed's changes #6675 (0.16.0), #7665 (0.18.3) and #8154 (0.19.3).
    """
    installed = Version(version("deepspeed"))
    if installed >= Version("0.19.3"):
        return "loss"
    return "every" if installed >= Version("0.18.3") else "nowhere"

"""How versions of DeepSpeed differ in what their pipelines compute, under 1F1B too."""

from __future__ import annotations

import functools
from importlib.metadata import version

from packaging.version import Version

__all__ = ["where_gradients_are_divided"]


@functools.cache
def where_gradients_are_divided() -> str:
    """By the number of micro-batches to an update: `stage.Stage.divides` of the installed version.

    Sources: DeepSpeed's changes #6675 (0.16.0), #7665 (0.18.3) and #8154 (0.19.3).
    """
    installed = Version(version("deepspeed"))
    if installed >= Version("0.19.3"):
        return "loss"
    return "every" if installed >= Version("0.18.3") else "nowhere"

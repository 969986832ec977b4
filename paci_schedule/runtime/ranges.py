"""The names of ops, F3, B0 and STEP1, in what a profiler shows of a run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import _profiler_enabled

from paci_schedule.core.ops import Op

__all__ = ["Ranges"]


class Ranges:
    """Executes ops under their names: for `torch.profiler` while one is on, and on CUDA for Nsight Systems (NVTX).

    Args:
        device: where the stage computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._marks = device.type == "cuda"

    def __call__(self, execute: Callable[[Op], None], op: Op) -> None:
        if _profiler_enabled():
            with torch.profiler.record_function(str(op)):
                self._execute(execute, op)
        else:
            self._execute(execute, op)

    def _execute(self, execute: Callable[[Op], None], op: Op) -> None:
        if not self._marks:
            execute(op)
            return
        torch.cuda.nvtx.range_push(str(op))
        try:
            execute(op)
        finally:
            torch.cuda.nvtx.range_pop()

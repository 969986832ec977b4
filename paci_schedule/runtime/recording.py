"""A recorded run: the newest ops of this rank with their starts and ends, in the format that ``paci trace`` reads.

The first line is a header that ties the monotonic clock to the wall clock; every other line is an op.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from paci_schedule.runtime.stopwatch import Stopwatch
from paci_schedule.spec import PipelineSpec

__all__ = ["write_recording"]


def write_recording(folder: str, spec: PipelineSpec, stage: int, replica: int, stopwatch: Stopwatch) -> None:
    """Write what `stopwatch` has recorded to the stage's file in `folder`, in place of what stood there."""
    path = Path(folder, f"stage{stage}-replica{replica}.jsonl")
    clock = {"wall": time.time(), "mono": time.perf_counter()}
    lines = [{"stage": stage, "stages": spec.stages, "accumulation": spec.accumulation, "clock": clock}]
    lines += ({"op": str(what), "start": start, "end": end} for what, start, end in stopwatch.spans())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

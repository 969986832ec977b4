"""The trace file that one rank writes: its format, and how it is read and written.

A trace file consists of JSON lines.  Its first line is the header,

    {"stage": 1, "stages": 4, "accumulation": 8, "clock": {"wall": 1760000000.25, "mono": 512.5}}

`clock` is one moment on two clocks: seconds since 1970, and the monotonic clock (time.perf_counter), which all other
lines use:

    {"op": "RA3", "start": 513.001, "end": 513.004}

`op` is an op as it prints: F3, B3, W3 and STEP0 compute; RA3 waits for the activation of micro-batch 3 and RG3 for its
gradient.  "data" is a read from the data iterator.  Micro-batches and updates are counted from 0 since the pipe was
last empty, and ops stand in the order of execution.  The file may begin anywhere in a run, because a rank keeps only
the newest records.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from paci_schedule.core.files import parse_json, read_text
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError, ScheduleError
from paci_schedule.simulate.timeline import Span

__all__ = ["Recording", "read", "write"]

_LARGEST = 1 << 26  # bytes of a file: more than half a million ops, where a rank keeps its newest


@dataclass(frozen=True)
class Recording:
    """What one rank recorded, on a clock in seconds.

    Attributes:
        stage: the rank's stage.
        stages: the number of stages.
        accumulation: the number of micro-batches in an update.
        spans: the ops, waits for messages among them; micro-batches are numbered on after a drain.
        data: (start, end) of every read from the data iterator.
    """

    stage: int
    stages: int
    accumulation: int
    spans: Sequence[Span]
    data: Sequence[tuple[float, float]]

    def shifted(self, seconds: float) -> Recording:
        """The same recording on a clock that shows `seconds` more."""
        return replace(
            self,
            spans=[Span(span.op, span.start + seconds, span.end + seconds) for span in self.spans],
            data=[(start + seconds, end + seconds) for start, end in self.data],
        )


def read(path: Path) -> Recording:
    """The recording in a trace file, on the wall clock.

    Raises:
        ConfigError: the file cannot be read or is not a trace; the error names the line.
    """
    try:
        lines = read_text(path, _LARGEST).splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"trace={str(path)!r}: cannot be read ({error}); name the file that a rank wrote") from None
    number = 1
    try:
        header = parse_json(lines[0])
        shift = float(header["clock"]["wall"]) - float(header["clock"]["mono"])
        if not -inf < shift < inf:
            raise ValueError(f"the clocks are {shift} apart")
        spec = PipelineSpec(stages=header["stages"], accumulation=header["accumulation"])
        spec.check_stage(header["stage"])
        spans: list[Span] = []
        data: list[tuple[float, float]] = []
        for number, line in enumerate(lines[1:], start=2):  # noqa: B007
            entry = parse_json(line)
            start, end = float(entry["start"]), float(entry["end"])
            if not -inf < start <= end < inf:
                raise ValueError(f"from {start} to {end} is not a span of time")
            if entry["op"] == "data":
                data.append((start, end))
            else:
                spans.append(Span(Op.parse(entry["op"]), start, end))
    except (IndexError, KeyError, TypeError, ValueError, ScheduleError) as error:
        raise ConfigError(
            f"trace={str(path)!r}: line {number} does not belong to a trace ({type(error).__name__}: {error}); "
            "see the format in paci_schedule/trace/file.py"
        ) from None
    if not any(span.op.kind is OpKind.FORWARD for span in spans):
        raise ConfigError(f"trace={str(path)!r}: contains no forward; record at least one batch")
    return Recording(header["stage"], spec.stages, spec.accumulation, _numbered_on(spans), data).shifted(shift)


def write(
    folder: str, spec: PipelineSpec, stage: int, replica: int, spans: Iterable[tuple[Op | str, float, float]]
) -> None:
    """Write the trace file of one rank to `folder`; an older file of the rank is replaced.

    Args:
        folder: it is created if it is missing.
        spec: the pipeline.
        stage: the rank's stage.
        replica: its data-parallel replica.
        spans: an op or "data", with its start and end in seconds of `time.perf_counter`; the oldest first.
    """
    path = Path(folder, f"stage{stage}-replica{replica}.jsonl")
    clock = {"wall": time.time(), "mono": time.perf_counter()}
    lines = [{"stage": stage, "stages": spec.stages, "accumulation": spec.accumulation, "clock": clock}]
    lines += ({"op": str(what), "start": start, "end": end} for what, start, end in spans)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")  # if the disk is full, the older file stays
    new.write_text("".join(json.dumps(line) + "\n" for line in lines))
    new.replace(path)


def _numbered_on(spans: Sequence[Span]) -> list[Span]:
    """The spans with micro-batches numbered on where a drain made them begin at 0 again."""
    numbered, offset, newest = [], 0, -1
    for span in spans:
        if span.op.kind in (OpKind.FORWARD, OpKind.RECV_ACTIVATION) and span.op.index <= newest - offset:
            offset = newest + 1
        if span.op.kind not in (OpKind.STEP, OpKind.SUM):
            span = span._replace(op=span.op._replace(index=span.op.index + offset))
        if span.op.kind is OpKind.FORWARD:
            newest = max(newest, span.op.index)
        numbered.append(span)
    return numbered

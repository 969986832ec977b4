"""The file that one rank records: its format, how it is read and how it is written.

A trace file is JSON lines, written by one rank.  Its first line is the header,

    {"stage": 1, "stages": 4, "accumulation": 8, "clock": {"wall": 1760000000.25, "mono": 512.5}}

`clock` is one moment read on both clocks: seconds since 1970, and the monotonic clock (time.perf_counter) of all other
lines:

    {"op": "RA3", "start": 513.001, "end": 513.004}

`op` is an op as it prints: F3, B3, W3 and STEP0 compute; RA3 waits for the activation of micro-batch 3 and RG3 for its
gradient.  "data" is reading from the data iterator.  Micro-batches and updates are counted from 0 since the pipe was
last empty, and ops stand in the order of execution; the file may begin anywhere in a run (a ring buffer's content).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError, ScheduleError
from paci_schedule.simulate.timeline import Span

__all__ = ["Recording", "read", "write"]


@dataclass(frozen=True)
class Recording:
    """What one rank recorded, on a clock of seconds.

    Attributes:
        stage: the rank's stage.
        stages: how many there are.
        accumulation: micro-batches an update.
        spans: ops, messages waited for among them, micro-batches numbered on over drains.
        data: (start, end) of every read from the data iterator.
    """

    stage: int
    stages: int
    accumulation: int
    spans: Sequence[Span]
    data: Sequence[tuple[float, float]]

    def shifted(self, seconds: float) -> Recording:
        """The same on a clock that shows `seconds` more."""
        return replace(
            self,
            spans=[Span(span.op, span.start + seconds, span.end + seconds) for span in self.spans],
            data=[(start + seconds, end + seconds) for start, end in self.data],
        )


def read(path: Path) -> Recording:
    """The recording in a trace file, on the wall clock.

    Raises:
        ConfigError: the file cannot be read or is not a trace; it names the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace={str(path)!r}: cannot be read ({error}); name the file that a rank wrote") from None
    number = 1
    try:
        header = json.loads(lines[0])
        shift = float(header["clock"]["wall"]) - float(header["clock"]["mono"])
        if not -inf < shift < inf:
            raise ValueError(f"the clocks are {shift} apart")
        spec = PipelineSpec(stages=header["stages"], accumulation=header["accumulation"])
        spec.check_stage(header["stage"])
        recording = Recording(header["stage"], spec.stages, spec.accumulation, [], [])
        for number, line in enumerate(lines[1:], start=2):  # noqa: B007
            entry = json.loads(line)
            start, end = float(entry["start"]), float(entry["end"])
            if not -inf < start <= end < inf:
                raise ValueError(f"from {start} to {end} is no time")
            if entry["op"] == "data":
                recording.data.append((start, end))
            else:
                recording.spans.append(Span(Op.parse(entry["op"]), start, end))
    except (IndexError, KeyError, TypeError, ValueError, ScheduleError) as error:
        raise ConfigError(
            f"trace={str(path)!r}: line {number} is not of a trace ({type(error).__name__}: {error}); "
            "see the format in paci_schedule/trace/file.py"
        ) from None
    if not any(span.op.kind is OpKind.FORWARD for span in recording.spans):
        raise ConfigError(f"trace={str(path)!r}: holds no forward; record at least one batch")
    return replace(recording, spans=_numbered_on(recording.spans)).shifted(shift)


def write(
    folder: str, spec: PipelineSpec, stage: int, replica: int, spans: Iterable[tuple[Op | str, float, float]]
) -> None:
    """Write the trace file of one rank to `folder`, in place of what stood there.

    Args:
        folder: made if it is missing.
        spec: the pipeline.
        stage: the rank's stage.
        replica: its data-parallel replica.
        spans: what, and its start and end in seconds of `time.perf_counter`, oldest first.
    """
    path = Path(folder, f"stage{stage}-replica{replica}.jsonl")
    clock = {"wall": time.time(), "mono": time.perf_counter()}
    lines = [{"stage": stage, "stages": spec.stages, "accumulation": spec.accumulation, "clock": clock}]
    lines += ({"op": str(what), "start": start, "end": end} for what, start, end in spans)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _numbered_on(spans: Sequence[Span]) -> list[Span]:
    """The spans with micro-batches numbered on where they begin at 0 again, after a drain."""
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

"""Recorded runs: what the ranks wrote down, their clocks merged, and where the time went.

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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from statistics import median

from paci_schedule.costs import Costs
from paci_schedule.errors import ConfigError, ScheduleError
from paci_schedule.ops import Op, OpKind
from paci_schedule.schedules.registry import schedule
from paci_schedule.simulate import execute
from paci_schedule.spec import PipelineSpec
from paci_schedule.timeline import Span, Timeline

__all__ = ["Recording", "last_batches", "merge", "read", "simulated", "spent", "timeline"]

_CATEGORIES = {
    OpKind.FORWARD: "compute",
    OpKind.BACKWARD: "compute",
    OpKind.WEIGHT: "compute",
    OpKind.STEP: "step",
    OpKind.RECV_ACTIVATION: "wait for activation",
    OpKind.RECV_GRADIENT: "wait for gradient",
}


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
            "see the format in paci_schedule/trace.py"
        ) from None
    if not any(span.op.kind is OpKind.FORWARD for span in recording.spans):
        raise ConfigError(f"trace={str(path)!r}: holds no forward; record at least one batch")
    return replace(recording, spans=_numbered_on(recording.spans)).shifted(shift)


def merge(recordings: Sequence[Recording]) -> list[Recording]:
    """The recordings by stage, on one clock.

    Wall clocks of two machines may differ.  No op starts before its message was made, which bounds the difference of
    two neighbours' clocks from both sides; where the wall clocks break a bound, the middle between the bounds is
    taken.

    Raises:
        ConfigError: a stage is missing or there twice, or the recordings are of different jobs.
    """
    ordered = sorted(recordings, key=lambda recording: recording.stage)
    stages = [recording.stage for recording in ordered]
    if len({(recording.stages, recording.accumulation) for recording in ordered}) != 1:
        raise ConfigError(
            "traces of different jobs: stages and accumulation differ between them; name the files of one run"
        )
    if stages != list(range(ordered[0].stages)):
        raise ConfigError(
            f"traces of stages {stages}: there must be one of each of the {ordered[0].stages} stages; name the files "
            "of one data-parallel replica, such as FOLDER/*-replica0.jsonl"
        )
    merged = ordered[:1]
    for recording in ordered[1:]:
        merged.append(recording.shifted(_correction(merged[-1], recording)))
    return merged


def timeline(recordings: Sequence[Recording]) -> Timeline:
    """The compute ops of merged recordings, the first of them at 0."""
    begin = min(span.start for recording in recordings for span in recording.spans)
    return Timeline(
        [[span for span in recording.shifted(-begin).spans if span.op.kind.is_compute] for recording in recordings]
    )


def last_batches(timeline: Timeline, accumulation: int, batches: int) -> Timeline:
    """The end of a timeline, from where its last stage begins the last but `batches` - 1 of its batches."""
    forwards = [span for span in timeline.rows[-1] if span.op.kind is OpKind.FORWARD]
    return replace(timeline, shown_from=forwards[max(0, len(forwards) - batches * accumulation)].start)


def spent(recording: Recording) -> dict[str, float]:
    """Where a stage's time went: category -> seconds.  "other" is sending, and what no record covers."""
    times = dict.fromkeys(["compute", "wait for activation", "wait for gradient", "step", "data", "other"], 0.0)
    for span in recording.spans:
        if span.op.kind in _CATEGORIES:
            times[_CATEGORIES[span.op.kind]] += span.end - span.start
    times["data"] = sum(end - start for start, end in recording.data)
    moments = [(span.start, span.end) for span in recording.spans] + list(recording.data)
    total = max(end for _, end in moments) - min(start for start, _ in moments)
    times["other"] = max(0.0, total - sum(times.values()))
    return times


def simulated(recordings: Sequence[Recording]) -> Timeline:
    """The same ops in the simulator, each taking its stage's median of that kind, with links that take no time.

    Micro-batches that not every stage recorded from F to the end of B are left out.

    Raises:
        ConfigError: no micro-batch was recorded whole, or the ops' order is not one that a pipeline can run.
    """
    rows = [[span for span in recording.spans if span.op.kind.is_compute] for recording in recordings]
    whole = set.intersection(
        *(
            {span.op.index for span in row if span.op.kind is OpKind.FORWARD}
            & {span.op.index for span in row if span.op.kind is OpKind.BACKWARD}
            for row in rows
        )
    )
    if not whole:
        raise ConfigError("traces without a micro-batch that every stage recorded from F to B; record a longer run")
    programs = [[[span.op for span in row if span.op.kind is OpKind.STEP or span.op.index in whole]] for row in rows]
    split = any(span.op.kind is OpKind.WEIGHT for row in rows for span in row)
    costs = Costs(
        forward=_medians(rows, OpKind.FORWARD),
        backward=_medians(rows, OpKind.BACKWARD),
        weight=_medians(rows, OpKind.WEIGHT),
        step=_medians(rows, OpKind.STEP),
    )
    try:
        return execute(schedule("zb-h1" if split else "paci"), programs, costs)
    except ScheduleError:
        raise ConfigError(
            "traces whose ops cannot run in the order that they stand in: lines are missing or there twice; record "
            "the run again"
        ) from None


def _medians(rows: Sequence[Sequence[Span]], kind: OpKind) -> list[float]:
    return [median([span.end - span.start for span in row if span.op.kind is kind] or [0.0]) for row in rows]


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


def _correction(above: Recording, below: Recording) -> float:
    """What to add to the clock of `below` so that no op of the two stages starts before what it needs was made."""

    def slack(makes: Recording, takes: Recording, kind: OpKind) -> float:
        made = {span.op.index: span.end for span in makes.spans if span.op.kind is kind}
        return min(
            (
                span.start - made[span.op.index]
                for span in takes.spans
                if span.op.kind is kind and span.op.index in made
            ),
            default=inf,
        )

    down, up = (
        slack(above, below, OpKind.FORWARD),
        slack(below, above, OpKind.BACKWARD),
    )  # add -down at least, up at most
    if min(down, up) >= 0:
        return 0.0
    if inf in (down, up):
        return up if down == inf else -down
    return (up - down) / 2

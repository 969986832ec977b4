"""The analysis of a recorded run: its ranks on one clock, where the time went, and the same ops in the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from statistics import median

from paci_schedule.core.ops import OpKind
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.errors import ConfigError, ScheduleError
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.execute import execute
from paci_schedule.simulate.timeline import Span, Timeline
from paci_schedule.trace.file import Recording

__all__ = ["between_ops", "last_batches", "merge", "simulated", "spent", "timeline"]

_CATEGORIES = {
    OpKind.FORWARD: "compute",
    OpKind.BACKWARD: "compute",
    OpKind.WEIGHT: "compute",
    OpKind.STEP: "step",
    OpKind.RECV_ACTIVATION: "wait for activation",
    OpKind.RECV_GRADIENT: "wait for gradient",
}


def merge(recordings: Sequence[Recording]) -> list[Recording]:
    """The recordings in the order of the stages, on one clock.

    The wall clocks of two machines may differ.  An op cannot start before its message was made, which bounds the
    difference between the clocks of two neighbouring stages from both sides.  Where the wall clocks break a bound, the
    clock of the later stage is moved to the middle between the bounds.

    Raises:
        ConfigError: a stage is missing or occurs twice, or the recordings are of different jobs.
    """
    ordered = sorted(recordings, key=lambda recording: recording.stage)
    stages = [recording.stage for recording in ordered]
    if len({(recording.stages, recording.accumulation) for recording in ordered}) != 1:
        raise ConfigError(
            "traces of different jobs: stages and accumulation differ between them; name the files of one run"
        )
    if stages != list(range(ordered[0].stages)):
        raise ConfigError(
            f"traces of stages {stages}: there must be one trace for each of the {ordered[0].stages} stages; name the "
            "files of one data-parallel replica, such as FOLDER/*-replica0.jsonl"
        )
    merged = ordered[:1]
    for recording in ordered[1:]:
        merged.append(recording.shifted(_correction(merged[-1], recording)))
    return merged


def timeline(recordings: Sequence[Recording]) -> Timeline:
    """The compute ops of merged recordings; the first of them starts at 0."""
    begin = min(span.start for recording in recordings for span in recording.spans)
    return Timeline(
        [[span for span in recording.shifted(-begin).spans if span.op.kind.is_compute] for recording in recordings]
    )


def last_batches(timeline: Timeline, accumulation: int, batches: int) -> Timeline:
    """The same timeline, of which only the last batches are drawn, as the last stage counts them."""
    forwards = [span for span in timeline.rows[-1] if span.op.kind is OpKind.FORWARD]
    return replace(timeline, shown_from=forwards[max(0, len(forwards) - batches * accumulation)].start)


def between_ops(recordings: Sequence[Recording]) -> list[list[tuple[str, float, float]]]:
    """For each stage of merged recordings its waits for messages and its data reads: name, start and end, on the clock
    of `timeline`."""
    begin = min(span.start for recording in recordings for span in recording.spans)
    names = {OpKind.RECV_ACTIVATION: "wait for activation", OpKind.RECV_GRADIENT: "wait for gradient"}
    found = []
    for recording in (each.shifted(-begin) for each in recordings):
        waits = [
            (f"{names[span.op.kind]} {span.op.index}", span.start, span.end)
            for span in recording.spans
            if span.op.kind in names
        ]
        found.append(sorted([*waits, *(("data", *read) for read in recording.data)], key=lambda note: note[1]))
    return found


def spent(recording: Recording) -> dict[str, float]:
    """Where a stage's time went: category -> seconds.  "other" is sending, and time that no record covers."""
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
    """The same ops in the simulator: each takes the median time of its kind on its stage, and links take no time.

    A micro-batch is left out unless every stage recorded it from its F to the end of its B.

    Raises:
        ConfigError: no micro-batch was recorded whole, or no pipeline can run the ops in their order.
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
    recorded = Schedule()
    recorded.splits_backward = any(span.op.kind is OpKind.WEIGHT for row in rows for span in row)
    costs = Costs(
        forward=_medians(rows, OpKind.FORWARD),
        backward=_medians(rows, OpKind.BACKWARD),
        weight=_medians(rows, OpKind.WEIGHT),
        step=_medians(rows, OpKind.STEP),
    )
    try:
        return execute(recorded, programs, costs)
    except ScheduleError:
        raise ConfigError(
            "traces whose ops cannot run in their order: lines are missing or occur twice; record the run again"
        ) from None


def _medians(rows: Sequence[Sequence[Span]], kind: OpKind) -> list[float]:
    return [median([span.end - span.start for span in row if span.op.kind is kind] or [0.0]) for row in rows]


def _correction(above: Recording, below: Recording) -> float:
    """What to add to the clock of `below` so that no op of the two stages starts before its message was made."""

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

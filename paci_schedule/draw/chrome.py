"""Timelines as Chrome traces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from paci_schedule.core.ops import OpKind
from paci_schedule.draw.shown import versions
from paci_schedule.simulate.timeline import Span, Timeline

__all__ = ["chrome_trace"]


Notes = Sequence[Sequence[tuple[str, float, float]]]
"""For each stage: what it did between its ops, with start and end."""


def chrome_trace(timelines: Mapping[str, Timeline], notes: Mapping[str, Notes] | None = None) -> dict[str, object]:
    """Timelines (title -> timeline, with times in seconds) as a Chrome trace for Perfetto (ui.perfetto.dev).

    Each timeline becomes a process, and each stage a thread of it.  Where there are notes of a timeline, each stage
    gets a second thread with them, and messages are arrows from op to op.
    """
    events: list[dict[str, object]] = []
    for process, (title, timeline) in enumerate(timelines.items()):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}})
        for stage, row in enumerate(timeline.rows):
            at = {"pid": process, "tid": stage}
            events.append({"ph": "M", "name": "thread_name", **at, "args": {"name": f"stage {stage}"}})
            events += ({"ph": "X", **at, **event} for event in _slices(row, timeline))
        if notes and title in notes:
            events += _noted(process, notes[title], timeline.start)
            events += _messages(process, timeline)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _noted(process: int, notes: Notes, origin: float) -> Iterator[dict[str, object]]:
    """The events of what stages did between their ops, each stage's on a thread of its own."""
    for stage, row in enumerate(notes):
        at = {"pid": process, "tid": len(notes) + stage}
        yield {"ph": "M", "name": "thread_name", **at, "args": {"name": f"stage {stage}, waits and data"}}
        for name, start, end in row:
            span = {"ts": (start - origin) * 1e6, "dur": (end - start) * 1e6}
            yield {"ph": "X", **at, "name": name, "cat": "data" if name == "data" else "wait", **span}


def _messages(process: int, timeline: Timeline) -> Iterator[dict[str, object]]:
    """An arrow for each activation and gradient, from the end of the op that makes it to the op that takes it."""
    made = {
        (stage, span.op): span
        for stage, row in enumerate(timeline.rows)
        for span in row
        if span.op.kind in (OpKind.FORWARD, OpKind.BACKWARD)
    }
    for number, ((stage, op), span) in enumerate(made.items()):
        down = op.kind is OpKind.FORWARD
        taker = stage + (1 if down else -1)
        if (taker, op) in made:
            arrow = {"cat": "message", "name": "activation" if down else "gradient", "id": number, "pid": process}
            sent, taken = (span.end - timeline.start) * 1e6, (made[taker, op].start - timeline.start) * 1e6
            yield {"ph": "s", **arrow, "tid": stage, "ts": sent}
            yield {"ph": "f", "bp": "e", **arrow, "tid": taker, "ts": max(sent, taken)}


def _slices(row: Sequence[Span], timeline: Timeline) -> Iterator[dict[str, object]]:
    """The events of one stage's ops, in microseconds."""
    names = {OpKind.FORWARD: "forward", OpKind.BACKWARD: "backward", OpKind.WEIGHT: "weight", OpKind.STEP: "step"}
    for span, version, older in versions(row, timeline.stashes):
        yield {
            "name": str(span.op),
            "cat": names[span.op.kind],
            "ts": (span.start - timeline.start) * 1e6,
            "dur": (span.end - span.start) * 1e6,
            "args": {"version": version, "drift": version - older},
        }

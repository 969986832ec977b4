"""Timelines as Chrome traces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from paci_schedule.core.ops import OpKind
from paci_schedule.draw.shown import versions
from paci_schedule.simulate.timeline import Span, Timeline

__all__ = ["chrome_trace"]


def chrome_trace(timelines: Mapping[str, Timeline]) -> dict[str, object]:
    """Timelines (title -> timeline, with times in seconds) as a Chrome trace for Perfetto (ui.perfetto.dev).

    Each timeline becomes a process, and each stage a thread of it.
    """
    events: list[dict[str, object]] = []
    for process, (title, timeline) in enumerate(timelines.items()):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}})
        for stage, row in enumerate(timeline.rows):
            at = {"pid": process, "tid": stage}
            events.append({"ph": "M", "name": "thread_name", **at, "args": {"name": f"stage {stage}"}})
            events += ({"ph": "X", **at, **event} for event in _slices(row, timeline.start))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _slices(row: Sequence[Span], origin: float) -> Iterator[dict[str, object]]:
    """The events of one stage's ops, in microseconds."""
    names = {OpKind.FORWARD: "forward", OpKind.BACKWARD: "backward", OpKind.WEIGHT: "weight", OpKind.STEP: "step"}
    for span, version, older in versions(row):
        yield {
            "name": str(span.op),
            "cat": names[span.op.kind],
            "ts": (span.start - origin) * 1e6,
            "dur": (span.end - span.start) * 1e6,
            "args": {"version": version, "drift": version - older},
        }

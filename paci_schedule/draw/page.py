"""A run as one HTML file that opens in any browser, without a server and without anything from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from paci_schedule.draw.colours import HUES
from paci_schedule.draw.shown import shown
from paci_schedule.simulate.timeline import Timeline

__all__ = ["page"]

Notes = Sequence[Sequence[tuple[str, float, float]]]


def page(
    title: str,
    summary: str,
    *,
    timelines: Mapping[str, Timeline] | None = None,
    notes: Mapping[str, Notes] | None = None,
    spent: Sequence[Mapping[str, float]] = (),
    verdicts: Sequence[str] = (),
    updates: Sequence[Sequence[Mapping[str, Any]]] = (),
    refresh: float | None = None,
) -> str:
    """The text of the file.

    Args:
        title, summary: the heading, and a line below it.
        timelines: title -> timeline, times in seconds; the part that is shown of each is drawn.
        notes: title of a timeline -> for each stage what it did between its ops, with start and end.
        spent: for each stage, category -> seconds.
        verdicts: what the run lost time to.
        updates: for each stage, rows with "update", "waiting_share", "drift", "micro_batches_per_second" and "loss".
        refresh: seconds after which the browser reads the file again; None for a run that has ended.
    """
    data = {
        "title": title,
        "summary": summary,
        "hues": HUES,
        "verdicts": list(verdicts),
        "spent": list(spent),
        "updates": [list(rows) for rows in updates],
        "runs": [
            {"title": name, "rows": _rows(timeline), "notes": (notes or {}).get(name, [])}
            for name, timeline in (timelines or {}).items()
        ],
    }
    text = files("paci_schedule.draw").joinpath("page.html").read_text(encoding="utf-8")
    again = "" if refresh is None else f'<meta http-equiv="refresh" content="{refresh:g}">'
    # In a script element only "</" could end the data early.
    return text.replace("<!--refresh-->", again).replace("/*data*/", json.dumps(data).replace("</", "<\\/"))


def _rows(timeline: Timeline) -> list[list[list[Any]]]:
    """For each stage its ops: name, kind, micro-batch, start, end, version, and the version of its forward."""
    return [
        [
            [str(span.op), span.op.kind.value, span.op.index, round(span.start, 6), round(span.end, 6), version, older]
            for span, version, older in row
        ]
        for row in shown(timeline)
    ]

"""A recorded run again, op by op, with some of what delayed it taken away.

Every op takes as long as it did, begins when its stage is free and its message has come, and a message takes as long as
the link's fastest one did, from when it was sent.  A message may be held back after the op that made it: the gradient
of a call's last round leaves when the next call begins, after the update and whatever the caller does.  Data reads, and
time that no record covers, delay the op that follows them.  So the run takes about as long as recorded, and what it
takes without one of its delays is what that delay costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from paci_schedule.core.ops import OpKind
from paci_schedule.simulate.timeline import Span
from paci_schedule.trace.file import Recording

__all__ = ["Replay"]

_WAITS = OpKind.RECV_ACTIVATION, OpKind.RECV_GRADIENT
_SENT_BY = {OpKind.FORWARD: OpKind.SEND_ACTIVATION, OpKind.BACKWARD: OpKind.SEND_GRADIENT}

Duration = Callable[[int, Span], float]
"""What an op of a stage takes."""


@dataclass(frozen=True)
class _Step:
    """An op, and what happens on its stage before it."""

    span: Span
    data: float
    other: float


class Replay:
    """The ops of merged recordings, ready to run.

    Attributes:
        links: seconds of the fastest message of each link, the mean of both directions, so that clocks that differ
            cancel; 0 where no message was recorded at both ends.
        held: seconds for which the messages of each link were held back, the mean over all of them.
    """

    def __init__(self, recordings: Sequence[Recording]) -> None:
        begin = min(span.start for recording in recordings for span in recording.spans)
        self._rows = [list(_steps(recording.shifted(-begin))) for recording in recordings]
        self._begin = [row[0].span.start - row[0].data - row[0].other for row in self._rows]
        self._held = [_held_back(recording.spans) for recording in recordings]
        self.links = [self._latency(stage) for stage in range(len(recordings) - 1)]
        self.held = [
            (_mean(self._held[link], OpKind.FORWARD) + _mean(self._held[link + 1], OpKind.BACKWARD)) / 2
            for link in range(len(recordings) - 1)
        ]

    def seconds(
        self,
        takes: Duration = lambda stage, span: span.end - span.start,
        links: Sequence[float] | None = None,
        data: bool = True,
    ) -> float:
        """How long the run takes, from the first op to the end of the last one.

        Args:
            takes: what each op takes; as recorded by default.
            links: what a message takes on each link; as recorded by default.
            data: whether data reads take time.
        """
        latency = self.links if links is None else links
        known = {(stage, step.span.op.kind, step.span.op.index) for stage, row in enumerate(self._rows) for step in row}
        ends: dict[tuple[int, OpKind, int], float] = {}
        free = [
            -inf if _source(stage, row[0].span)[0] in known else begin
            for stage, (row, begin) in enumerate(zip(self._rows, self._begin, strict=True))
        ]
        position, moving = [0] * len(self._rows), True
        while moving:
            moving = False
            for stage, row in enumerate(self._rows):
                while position[stage] < len(row):
                    step = row[position[stage]]
                    source, link = _source(stage, step.span)
                    if source in known and source not in ends:
                        break
                    arrived = -inf
                    if source in ends:
                        arrived = ends[source] + self._held[source[0]].get(source[1:], 0.0) + latency[link]
                    ready = free[stage] + step.other + step.data * data
                    free[stage] = max(ready, arrived) + takes(stage, step.span)
                    ends[stage, step.span.op.kind, step.span.op.index] = free[stage]
                    position[stage] += 1
                    moving = True
        return max(free) - min(self._begin)  # the stage that begins first waits for nobody

    def spans(self) -> list[list[Span]]:
        """The ops of every stage."""
        return [[step.span for step in row] for row in self._rows]

    def delays(self) -> list[list[tuple[Span, float]]]:
        """The ops of every stage, each with the seconds of data reads and of uncovered time before it."""
        return [[(step.span, step.data + step.other) for step in row] for row in self._rows]

    def data_share(self) -> list[float]:
        """Seconds of data reads of every stage."""
        return [sum(step.data for step in row) for row in self._rows]

    def _latency(self, stage: int) -> float:
        """The mean over both directions of the fastest message of the link behind `stage`."""

        def fastest(makes: int, takes: int, kind: OpKind) -> float:
            made = {
                step.span.op.index: step.span.end + self._held[makes].get((kind, step.span.op.index), 0.0)
                for step in self._rows[makes]
                if step.span.op.kind is kind
            }
            return min(
                (
                    step.span.start - made[step.span.op.index]
                    for step in self._rows[takes]
                    if step.span.op.kind is kind and step.span.op.index in made
                ),
                default=0.0,
            )

        down, up = fastest(stage, stage + 1, OpKind.FORWARD), fastest(stage + 1, stage, OpKind.BACKWARD)
        return max(0.0, (down + up) / 2)


def _held_back(spans: Sequence[Span]) -> dict[tuple[OpKind, int], float]:
    """Seconds from the end of each op whose message was recorded to the moment that it was sent."""
    sent = {(span.op.kind, span.op.index): span.start for span in spans if span.op.kind in _SENT_BY.values()}
    return {
        (kind, index): max(0.0, sent[_SENT_BY[kind], index] - span.end)
        for span in spans
        for kind, index, _ in [span.op]
        if kind in _SENT_BY and (_SENT_BY[kind], index) in sent
    }


def _mean(held: Mapping[tuple[OpKind, int], float], kind: OpKind) -> float:
    found = [seconds for (each, _), seconds in held.items() if each is kind]
    return sum(found) / len(found) if found else 0.0


def _source(stage: int, span: Span) -> tuple[tuple[int, OpKind, int], int]:
    """The op that makes what this one waits for, and the link between them."""
    kind, index = span.op.kind, span.op.index
    if kind is OpKind.FORWARD:
        return (stage - 1, kind, index), stage - 1
    return (stage + 1, kind, index), stage


def _steps(recording: Recording) -> Iterator[_Step]:
    """The compute ops of a stage that it did once, each with the data reads and the uncovered time before it."""
    moments = [(span.start, span.end, span) for span in recording.spans]
    moments += [(start, end, None) for start, end in recording.data]
    moments.sort(key=lambda moment: moment[:2])
    counts = Counter(span.op for span in recording.spans)
    data, covered, last = 0.0, 0.0, moments[0][0]
    for start, end, span in moments:
        covered += max(0.0, start - last)
        last = max(last, end)
        if span is None:
            data += end - start
        elif span.op.kind not in _WAITS and span.op.kind.is_compute and counts[span.op] == 1:
            yield _Step(span, data, covered)
            data = covered = 0.0

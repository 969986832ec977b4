"""What a recorded run lost its time to: a slow stage, a slow link, jitter, or data, each with its cost.

A cost is the share of the run's time that it would not have taken without that cause (`trace.replay`).  Costs do not
add up: two causes may delay the same op, and taking away one of them then gains little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean, median, pstdev

from paci_schedule.core.ops import OpKind
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.timeline import Span
from paci_schedule.trace.file import Recording
from paci_schedule.trace.replay import Replay

__all__ = ["Verdict", "ideal_seconds", "recorded_costs", "seconds_per_micro_batch", "stage_seconds", "verdicts"]

_LEAST = 0.01  # of the run: a smaller cost is not worth a line
_SLOWER = 1.05  # than the others, from where on a stage counts as slow
_ROUNDING = 1e-6
_WORK = OpKind.FORWARD, OpKind.BACKWARD, OpKind.WEIGHT


@dataclass(frozen=True)
class Verdict:
    """A cause of lost time.

    Attributes:
        cause: "stage", "link", "jitter" or "data".
        where: the stage, or the link (link 1 is between the stages 1 and 2); None for jitter and data.
        finding: what was found, as a sentence without its cost.
        cost: the share of the run's time that is lost to it.
        remedy: what to try.
    """

    cause: str
    where: int | None
    finding: str
    cost: float
    remedy: str

    def __str__(self) -> str:
        return f"{self.finding}: costs {self.cost:.0%}; {self.remedy}"


def verdicts(recordings: Sequence[Recording]) -> list[Verdict]:
    """The causes that cost at least 1% of the run, the dearest first.

    Args:
        recordings: merged ones.
    """
    replay = Replay(recordings)
    whole = replay.seconds()
    found = [*_stages(replay), *_links(replay), *_jitter(replay), *_data(replay)]
    costs = [(1 - seconds / whole, verdict) for verdict, seconds in found]
    said = [Verdict(one.cause, one.where, one.finding, cost, one.remedy) for cost, one in costs if cost >= _LEAST]
    return sorted(said, key=lambda verdict: -verdict.cost)


def stage_seconds(recordings: Sequence[Recording]) -> list[float]:
    """What a micro-batch takes each stage to compute: the sum of the medians of F, B and W."""
    return [sum(_medians(recording.spans).get(kind, 0.0) for kind in _WORK) for recording in recordings]


def recorded_costs(recordings: Sequence[Recording]) -> Costs:
    """The costs of a run: means of every stage's ops, how much these vary, and the latencies of the links.

    Time between two ops that no record covers, and data reads, count with the op that follows them.  The latency of a
    link contains the time for which its messages were held back, on average.
    """
    replay = Replay(recordings)
    means = [_means(steps) for steps in replay.delays()]

    def of(kind: OpKind) -> list[float]:
        return [each.get(kind, 0.0) for each in means]

    weight = of(OpKind.WEIGHT)
    return Costs(
        forward=of(OpKind.FORWARD),
        backward=of(OpKind.BACKWARD),
        weight=weight if any(weight) else None,
        step=of(OpKind.STEP),
        latency=[seconds + held for seconds, held in zip(replay.links, replay.held, strict=True)],
        jitter=_variation(replay.delays()),
    )


def ideal_seconds(recordings: Sequence[Recording]) -> float:
    """What the run would have taken if all stages were as fast as their mean and never waited for anything."""
    rows = [[span for span in recording.spans if span.op.kind.is_compute] for recording in recordings]
    return sum(span.end - span.start for row in rows for span in row) / len(rows)


def seconds_per_micro_batch(recordings: Sequence[Recording]) -> float:
    """The time from one backward of the last stage to the next, on average over the recording."""
    ends = [span.end for span in recordings[-1].spans if span.op.kind is OpKind.BACKWARD]
    return (ends[-1] - ends[0]) / max(1, len(ends) - 1)


def _stages(replay: Replay) -> Iterator[tuple[Verdict, float]]:
    works = [sum(_medians(row).get(kind, 0.0) for kind in _WORK) for row in replay.spans()]
    for stage, work in enumerate(works):
        others = median([each for other, each in enumerate(works) if other != stage] or [work])
        if work < _SLOWER * others or not others:
            continue

        def as_fast_as_the_others(at: int, span: Span, slow: int = stage, ratio: float = others / work) -> float:
            return (span.end - span.start) * (ratio if at == slow and span.op.kind in _WORK else 1)

        yield (
            Verdict(
                "stage",
                stage,
                f"stage {stage} is {work / others - 1:.0%} slower than the others",
                0.0,
                "give it fewer layers (docs/uneven-stages.md), or look at its device",
            ),
            replay.seconds(as_fast_as_the_others),
        )


def _links(replay: Replay) -> Iterator[tuple[Verdict, float]]:
    for link, seconds in enumerate(replay.links):
        if seconds > 0:
            fast = [0.0 if at == link else each for at, each in enumerate(replay.links)]
            yield (
                Verdict(
                    "link",
                    link,
                    f"link {link}-{link + 1}: {1e3 * seconds:.3g} ms a message",
                    0.0,
                    'hide it with slack ("extra_in_flight"; paci simulate --suggest-slack)',
                ),
                replay.seconds(links=fast),
            )


def _jitter(replay: Replay) -> Iterator[tuple[Verdict, float]]:
    usual = [_medians(row) for row in replay.spans()]
    varied = [
        abs(span.end - span.start - usual[stage][span.op.kind]) / usual[stage][span.op.kind]
        for stage, row in enumerate(replay.spans())
        for span in row
        if span.op.kind in _WORK and usual[stage][span.op.kind] > 0
    ]
    if varied:
        yield (
            Verdict(
                "jitter",
                None,
                f"jitter: ops take {sum(varied) / len(varied):.0%} more or less than their median",
                0.0,
                "look for other work on these machines, for clocks that change, and for unequal inputs",
            ),
            replay.seconds(lambda stage, span: usual[stage][span.op.kind]),
        )


def _data(replay: Replay) -> Iterator[tuple[Verdict, float]]:
    read = replay.data_share()
    if any(read):
        stage = max(range(len(read)), key=read.__getitem__)
        yield (
            Verdict(
                "data",
                None,
                f"data: stage {stage} reads for {read[stage]:.3g} s",
                0.0,
                "give the loader workers, or a longer queue",
            ),
            replay.seconds(data=False),
        )


def _means(steps: Sequence[tuple[Span, float]]) -> dict[OpKind, float]:
    """The mean time of every kind of op, with what delayed it."""
    lengths: dict[OpKind, list[float]] = {}
    for span, before in steps:
        lengths.setdefault(span.op.kind, []).append(before + span.end - span.start)
    return {kind: mean(each) for kind, each in lengths.items()}


def _variation(rows: Sequence[Sequence[tuple[Span, float]]]) -> float:
    """The coefficient of variation of F, B and W, on average over kinds and stages."""
    found = []
    for steps, kind in product(rows, _WORK):
        lengths = [before + span.end - span.start for span, before in steps if span.op.kind is kind]
        if len(lengths) > 1 and any(lengths):
            found.append(pstdev(lengths) / mean(lengths))
    return mean(found) if found and max(found) > _ROUNDING else 0.0


def _medians(spans: Sequence[Span]) -> dict[OpKind, float]:
    """The median time of every kind of op."""
    lengths: dict[OpKind, list[float]] = {}
    for span in spans:
        if span.op.kind.is_compute:
            lengths.setdefault(span.op.kind, []).append(span.end - span.start)
    return {kind: median(each) for kind, each in lengths.items()}

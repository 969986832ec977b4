"""Run a schedule without hardware: every op starts when its stage is free and its message has arrived.

This simulator executes any schedule.  `wavefront.py` runs PACI's stream many times faster, with the same results.

* A stage does one op at a time, in the order of its program.
* A message starts when its op ends and its link is free, occupies the link for bytes / bandwidth, and arrives one
  latency later.  Sends and receives cost the stage nothing.  The two directions of a link do not disturb each other.

Receives are not posted here.  Where a transport begins only when the receive is posted, `transfers.py` says what that
costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from paci_schedule.core import grid
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError, ScheduleError
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.timeline import Span, Timeline

__all__ = ["check_size", "durations", "execute", "simulate"]

_MOST_OPS = 10_000_000
_KINDS = OpKind.FORWARD, OpKind.BACKWARD, OpKind.WEIGHT, OpKind.STEP


def simulate(schedule: Schedule, spec: PipelineSpec, costs: Costs, batches: int = 1) -> Timeline:
    """The timeline of `batches` batches of `schedule`, from an empty pipe to an empty pipe, beginning at 0.

    Raises:
        ConfigError: the schedule does not exist for `spec`, or a list of costs has another length than the stages.
    """
    check_size(schedule, spec, batches)
    programs = [list(schedule.calls(spec, stage, batches)) for stage in range(spec.stages)]
    stashes = any(schedule.weight_versions(spec, stage) > 1 for stage in range(spec.stages))
    return replace(execute(schedule, programs, costs), stashes=stashes)


def check_size(schedule: Schedule, spec: PipelineSpec, batches: int, why: str = "") -> None:
    """Raises ConfigError where the schedule does not exist for `spec`, or has more ops than can be held.

    Args:
        schedule: which schedule.
        spec: the pipeline.
        batches: how many batches.
        why: for the message: why there are so many batches, where the user has not asked for them.
    """
    schedule.check(spec)
    count = (2 + schedule.splits_backward) * spec.stages * schedule.chunks * spec.accumulation * batches
    if count > _MOST_OPS:
        raise ConfigError(
            f"{spec.stages} stages x {spec.accumulation} micro-batches x {batches} batches{why}: up to {count} ops, "
            f"and the general simulator holds {_MOST_OPS}; take fewer, or simulate paci, which goes further"
        )


def execute(schedule: Schedule, programs: Sequence[Sequence[Iterable[Op]]], costs: Costs) -> Timeline:
    """The timeline of the stages' programs, each a list of calls; `schedule` says where the chunks are.

    Raises:
        ScheduleError: every stage waits for another one.
    """
    stages = len(programs)
    ops, calls = [], []
    for program in programs:
        ops.append([])
        calls.append([])
        for call in program:
            ops[-1].extend(call)
            calls[-1].append(len(ops[-1]))
    rows = _run(schedule, ops, calls, costs)
    stuck = [stage for stage in range(stages) if len(rows[stage]) < len(ops[stage])]
    if stuck:
        shown = {stage: ops[stage] for stage in stuck}
        raise ScheduleError(
            "deadlock: every stage waits for another one at the marked op\n"
            + grid.marked(shown, {stage: len(rows[stage]) for stage in stuck})
        )
    return Timeline(rows, calls)


def _run(schedule: Schedule, ops: list[list[Op]], calls: list[list[int]], costs: Costs) -> list[list[Span]]:
    """Run the stages until each has finished or waits for good."""
    stages, (forward, backward, weight, step) = len(ops), _KINDS
    takes = durations(schedule, ops, costs)
    latencies, transfers, last = costs.latencies(stages), costs.transfers(stages), stages * schedule.chunks - 1
    position = [
        [schedule.position(stages, stage, chunk) for chunk in range(schedule.chunks)] for stage in range(stages)
    ]
    home = {at: stage for stage, row in enumerate(position) for at in row}
    wrap = float(transfers[-1]), float(latencies[-1])
    links = {(low, low + 1): (float(transfers[low]), float(latencies[low])) for low in range(stages - 1)}
    links |= {(high, low): value for (low, high), value in links.items()}
    arrived: dict[tuple[OpKind, int, int], float] = {}
    link_free: dict[tuple[int, int], float] = {}
    free, synced = [0.0] * stages, [0] * stages
    rows: list[list[Span]] = [[] for _ in ops]

    def deliver(stage: int, kind: OpKind, at: int, index: int, end: float) -> int:
        """Send what an op made to position `at`; returns the stage that may now go on."""
        there = home[at]
        if there != stage:
            transfer, latency = links.get((stage, there), wrap)
            end = link_free[stage, there] = max(end, link_free.get((stage, there), 0.0)) + transfer
            end += latency
        arrived[kind, at, index] = end
        return there

    def advance(stage: int) -> set[int]:
        """Run `stage` until it has to wait; returns the stages that it sent something to."""
        woken, row, program = set(), rows[stage], ops[stage]
        while len(row) < len(program):
            if costs.sync is not None and len(row) == calls[stage][synced[stage]]:
                break
            op = program[len(row)]
            at, start = position[stage][op.chunk], free[stage]
            if op.kind is not step and (at or op.kind is not forward):  # the first forward and steps wait for nothing
                came = arrived.pop((op.kind, at, op.index), None)
                if came is None:
                    break
                start = max(start, came)
            end = free[stage] = start + takes(stage, op)
            row.append(Span(op, start, end))
            if op.kind is forward and at < last:
                woken.add(deliver(stage, forward, at + 1, op.index, end))
            elif op.kind is forward:
                arrived[backward, at, op.index] = end
            elif op.kind is backward:
                arrived[weight, at, op.index] = end
                if at:
                    woken.add(deliver(stage, backward, at - 1, op.index, end))
        return woken - {stage}

    ready = set(range(stages))
    while ready:
        ready |= advance(ready.pop())
        if not ready and costs.sync is not None and _all_at_sync(rows, calls, synced):
            free[:] = [max(free) + costs.sync] * stages
            synced[:] = [number + 1 for number in synced]
            ready = set(range(stages)) if synced[0] < len(calls[0]) else set()
    return rows


def _all_at_sync(rows: list[list[Span]], calls: list[list[int]], synced: list[int]) -> bool:
    """True where every stage has done the call that it is in."""
    return all(
        number < len(ends) and len(row) == ends[number] for row, ends, number in zip(rows, calls, synced, strict=True)
    )


def durations(schedule: Schedule, ops: list[list[Op]], costs: Costs):
    """A function of stage and op that says how long the op takes."""
    base = {kind: times.tolist() for kind, times in costs.durations(schedule, len(ops)).items()}
    if not costs.jitter:
        return lambda stage, op: base[op.kind][stage]
    count = 1 + max((op.index for row in ops for op in row), default=0)
    factors: dict[tuple[OpKind, int], np.ndarray | None] = {}
    for kind in base:
        for chunk in range(schedule.chunks):
            noise = costs.noise(kind, chunk, len(ops))
            factors[kind, chunk] = None if noise is None else noise.rows(count)

    def takes(stage: int, op: Op) -> float:
        noise = factors[op.kind, op.chunk]
        return base[op.kind][stage] * (1.0 if noise is None else float(noise[op.index, stage]))

    return takes

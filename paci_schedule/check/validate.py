"""Is this a valid pipeline schedule?  Order, pairing, drift and memory bounds, and freedom from deadlock.

Errors show the grid with the offending op marked, so that a schedule can be debugged from the message alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from paci_schedule.check.rendezvous import NEVER, Synchronising, check_rendezvous
from paci_schedule.core import grid
from paci_schedule.core.drift import DriftMeter, drift_bound, drift_of
from paci_schedule.core.lower import lower
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.schedules.paci import Segment
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ScheduleError
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.execute import check_size, execute

__all__ = ["check_grid", "check_messages", "check_rendezvous", "check_schedule", "check_segments", "check_stream"]

Program = Sequence[Op]


def check_schedule(schedule: Schedule, spec: PipelineSpec, batches: int = 3) -> None:
    """Check `batches` batches of any schedule, from an empty pipe to an empty pipe: see `check_grid`.

    Raises:
        ConfigError: the schedule does not exist for `spec`, or has more ops than can be held.
        ScheduleError: naming the first violation and showing the grid.
    """
    check_size(schedule, spec, batches)
    check_grid(schedule, spec, [list(schedule.stream(spec, stage, batches)) for stage in range(spec.stages)])


def check_grid(schedule: Schedule, spec: PipelineSpec, rows: Sequence[Program]) -> None:
    """Check that the rows keep what `schedule` promises.

    On every stage and chunk every micro-batch has one F, then one B, then, where the backward is split, one W; an
    update holds exactly its own micro-batches; in flight and drift stay within the schedule's bounds.  Together the
    stages finish.

    Raises:
        ScheduleError: naming the op, the rule and showing the row.
    """
    if len(rows) != spec.stages:
        raise ScheduleError(f"{len(rows)} rows for {spec.stages} stages: write one row a stage")
    counts = {sum(op.kind is OpKind.FORWARD for op in row) for row in rows}
    if len(counts) > 1:
        raise ScheduleError(f"the stages have {sorted(counts)} forwards: every stage runs every micro-batch")
    for stage, row in enumerate(rows):
        _check_row(schedule, spec, stage, row)
    execute(schedule, [[row] for row in rows], Costs(forward=1.0, backward=1.0, weight=1.0))


def _check_row(schedule: Schedule, spec: PipelineSpec, stage: int, row: Program) -> None:
    """What `check_grid` says of one stage."""
    path = [OpKind.FORWARD, OpKind.BACKWARD] + [OpKind.WEIGHT] * schedule.splits_backward
    done: dict[tuple[int, int], int] = {}
    meter, held, finished = DriftMeter(), 0, 0
    per_update = schedule.micro_batches_per_update(spec)

    def fail(position: int, rule: str) -> ScheduleError:
        return ScheduleError(f"stage {stage}: {rule}\n{grid.marked({stage: row}, {stage: position})}")

    for position, op in enumerate(row):
        if op.kind is OpKind.STEP:
            if op.index != meter.version or finished != (op.index + 1) * per_update * schedule.chunks:
                raise fail(
                    position, f"{op} after {finished} backwards, with {per_update * schedule.chunks} to an update"
                )
        elif op.kind not in path or op.chunk >= schedule.chunks:
            raise fail(position, f"{op} is not an op of {schedule.name} with {schedule.chunks} chunks a stage")
        else:
            past = done.get((op.index, op.chunk), 0)
            if past >= len(path) or path[past] is not op.kind:
                wanted = path[past].value if past < len(path) else "nothing"
                raise fail(position, f"{op} where {wanted} of that micro-batch is next")
            done[op.index, op.chunk] = past + 1
            if (schedule.flushes or past) and meter.version != op.index // per_update:
                raise fail(position, f"{op} at version {meter.version}, its update is {op.index // per_update}")
            ends = past + 1 == len(path)
            finished += ends
            held += (not past) - ends
        drift = meter.record(op)
        if drift is not None and drift > schedule.drift_bound(spec, stage):
            raise fail(position, f"drift {drift} at {op}, bound {schedule.drift_bound(spec, stage)}")
        if held > schedule.in_flight(spec, stage):
            raise fail(position, f"{held} in flight, at most {schedule.in_flight(spec, stage)} allowed")
    if held or len(done) != schedule.chunks * len({index for index, _ in done}):
        raise fail(len(row) - 1, f"{held} in flight at the end, {len(done)} of the chunks' micro-batches begun")
    if meter.version * per_update * schedule.chunks != finished:
        raise fail(len(row) - 1, f"{finished} backwards but {meter.version} updates of {per_update * schedule.chunks}")


def check_segments(spec: PipelineSpec, segments: Sequence[Segment]) -> None:
    """Check segments that begin and end with an empty pipe: every stage's stream, and the links between them.

    Raises:
        ScheduleError: naming the first violation and showing the grid.
    """
    for stage in range(spec.stages):
        ops: list[Op] = []
        for segment in segments:
            if segment.start == 0:
                check_stream(spec, stage, ops)
                ops = []
            ops.extend(segment.ops(stage))
        check_stream(spec, stage, ops)
    check_messages(spec, segments)


def check_messages(
    spec: PipelineSpec,
    segments: Sequence[Segment],
    *,
    ties: Sequence[Sequence[int]] = (),
    early_receives: bool = False,
    synchronising: Synchronising = NEVER,
) -> None:
    """Check that the programs to which the segments are lowered never wait for one another in a circle.

    Args:
        spec: the pipeline.
        segments: from an empty pipe to an empty pipe; each is a call of the training loop.
        ties: as in `lower`.
        early_receives: as in `lower`.
        synchronising: what waits for its stage's whole device.

    Raises:
        ScheduleError: see `check_rendezvous`.
    """
    programs, ends = [], []
    for stage in range(spec.stages):
        program: list[Op] = []
        ends.append([])
        for segment in segments:
            program.extend(lower(segment, stage, ties=ties, early_receives=early_receives))
            ends[-1].append(len(program))
        programs.append(program)
    check_rendezvous(programs, [spec.gradients_on_wire(stage) for stage in range(spec.stages)], synchronising, ends)


def check_stream(spec: PipelineSpec, stage: int, ops: Program) -> None:
    """Check one stage's compute ops, from an empty pipe to an empty pipe.

    Every micro-batch has one F and then one B, in micro-batch order; every a-th B is followed by its STEP; drift equals
    the closed form and, like the micro-batches in flight, stays within its bound.

    Raises:
        ScheduleError: naming the op, the rule and showing the stream.
    """
    meter, forwards, backwards = DriftMeter(), 0, 0

    def fail(position: int, rule: str) -> ScheduleError:
        return ScheduleError(f"stage {stage}: {rule}\n{grid.marked({stage: ops}, {stage: position})}")

    for position, op in enumerate(ops):
        due = backwards // spec.accumulation
        if op.kind is OpKind.FORWARD:
            if op.index != forwards:
                raise fail(position, f"{op} where F{forwards} is next")
            forwards += 1
        elif op.kind is OpKind.BACKWARD:
            if op.index != backwards or backwards >= forwards:
                raise fail(position, f"{op} where B{backwards} is next and {forwards} forwards are done")
            if meter.version != due:
                rule = f"{op} before STEP{due - 1}: a step belongs after every {spec.accumulation}-th backward"
                raise fail(position, rule)
            backwards += 1
        elif op.kind is OpKind.STEP:
            if op.index != meter.version or (op.index + 1) * spec.accumulation != backwards:
                raise fail(position, f"{op} after {backwards} backwards, with {spec.accumulation} to an update")
        else:
            raise fail(position, f"{op} is not a compute op of this schedule")
        drift = meter.record(op)
        if drift is not None and not drift == drift_of(spec, stage, op.index) <= drift_bound(spec, stage):
            raise fail(
                position,
                f"drift {drift} at {op}, closed form {drift_of(spec, stage, op.index)}, "
                f"bound {drift_bound(spec, stage)}",
            )
        if meter.in_flight > spec.in_flight(stage):
            raise fail(position, f"{meter.in_flight} micro-batches in flight, at most {spec.in_flight(stage)} allowed")
    if backwards != forwards:
        raise fail(len(ops) - 1, f"{forwards} forwards but {backwards} backwards")
    if meter.version != backwards // spec.accumulation:
        raise fail(len(ops) - 1, f"STEP{meter.version} is missing after {backwards} backwards")

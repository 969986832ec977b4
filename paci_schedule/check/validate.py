"""A check that a pipeline schedule is valid: its order, its pairs of ops, its bounds of drift and memory, no deadlock.

Errors show the grid with the offending op marked, so that a schedule can be debugged from the message only.
"""

from __future__ import annotations

from collections.abc import Sequence

from paci_schedule.check.rendezvous import ALWAYS, Synchronising, check_rendezvous
from paci_schedule.core import grid
from paci_schedule.core.drift import DriftMeter
from paci_schedule.core.lower import Lowering
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.base import Call, Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ScheduleError
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.execute import check_size, execute

__all__ = ["check_grid", "check_messages", "check_schedule"]

Program = Sequence[Op]


def check_schedule(schedule: Schedule, spec: PipelineSpec, batches: int = 3) -> None:
    """Check `batches` batches of any schedule, from an empty pipe to an empty pipe.

    The stages' rows are checked as `check_grid` says.  Where engines can run the schedule, its messages are checked,
    too: they never wait in a circle, even if every op waits for its device.

    Raises:
        ConfigError: the schedule does not exist for `spec`, or has more ops than can be held.
        ScheduleError: naming the first violation and showing the grid.
    """
    check_size(schedule, spec, batches)
    check_grid(schedule, spec, [list(schedule.stream(spec, stage, batches)) for stage in range(spec.stages)])
    if not schedule.cannot_run:
        check_messages(schedule, spec, list(schedule.run(spec, batches)))


def check_grid(schedule: Schedule, spec: PipelineSpec, rows: Sequence[Program]) -> None:
    """Check that the rows of ops keep what `schedule` promises.

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
    """Check the row of one stage, as `check_grid` says."""
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


def check_messages(
    schedule: Schedule,
    spec: PipelineSpec,
    calls: Sequence[Call],
    *,
    ties: Sequence[Sequence[int]] = (),
    early_receives: bool = False,
    synchronising: Synchronising = ALWAYS,
) -> None:
    """Check that the stages' programs, with their messages, never wait for one another in a circle.

    Args:
        schedule: what the calls belong to.
        spec: the pipeline.
        calls: those of a training loop, from an empty pipe to an empty pipe.
        ties: as in `Lowering`.
        early_receives: as in `Lowering`.
        synchronising: what waits for its stage's whole device; by default every op does.

    Raises:
        ScheduleError: see `check_rendezvous`.
    """
    programs, ends = [], []
    for stage in range(spec.stages):
        lowering = Lowering(schedule, spec, stage, ties=ties, early_receives=early_receives)
        program: list[Op] = []
        ends.append([])
        for call in calls:
            program.extend(lowering.program(call))
            ends[-1].append(len(program))
        programs.append(program)
    on_wire = [schedule.gradients_on_wire(spec, stage) for stage in range(spec.stages)]
    check_rendezvous(programs, on_wire, synchronising, ends)

"""Is this a valid pipeline schedule?  Order, pairing, drift and memory bounds, and freedom from deadlock.

Errors show the grid with the offending op marked, so that a schedule can be debugged from the message alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from paci_schedule.drift import DriftMeter, drift_bound, drift_of
from paci_schedule.errors import ScheduleError
from paci_schedule.lower import lower
from paci_schedule.ops import Op, OpKind
from paci_schedule.schedules.paci import Segment
from paci_schedule.spec import PipelineSpec

__all__ = ["check_rendezvous", "check_segments", "check_stream"]

Program = Sequence[Op]

_LINKS = {  # kind -> (direction of the link, stage offset of its sender, role)
    OpKind.EXPECT_ACTIVATION: ("activation", -1, "expect"),
    OpKind.RECV_ACTIVATION: ("activation", -1, "receive"),
    OpKind.SEND_ACTIVATION: ("activation", 0, "send"),
    OpKind.EXPECT_GRADIENT: ("gradient", +1, "expect"),
    OpKind.RECV_GRADIENT: ("gradient", +1, "receive"),
    OpKind.SEND_GRADIENT: ("gradient", 0, "send"),
}


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
    check_rendezvous(
        [[op for segment in segments for op in lower(segment, stage)] for stage in range(spec.stages)],
        [spec.gradients_on_wire(stage) for stage in range(spec.stages)],
    )


def check_stream(spec: PipelineSpec, stage: int, ops: Program) -> None:
    """Check one stage's compute ops, from an empty pipe to an empty pipe.

    Every micro-batch has one F and then one B, in micro-batch order; every a-th B is followed by its STEP; drift equals
    the closed form and, like the micro-batches in flight, stays within its bound.

    Raises:
        ScheduleError: naming the op, the rule and showing the stream.
    """
    meter, forwards, backwards = DriftMeter(), 0, 0

    def fail(position: int, rule: str) -> ScheduleError:
        return ScheduleError(f"stage {stage}: {rule}\n{_marked({stage: ops}, {stage: position})}")

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


def check_rendezvous(programs: Sequence[Program], gradients_on_wire: Sequence[int]) -> None:
    """Run the stages' programs against each other with the least that a transport must do.

    A send blocks until its receive is posted, or, on a link that may have g gradients on the wire, the receive g - 1
    before it; a wait blocks until the send has started.  Programs that finish under this rule finish under every weaker
    one (asynchronous sends, buffered links).

    Args:
        programs: what each stage does, in order.
        gradients_on_wire: for each stage, how many gradients it may have on the wire (`PipelineSpec`).

    Raises:
        ScheduleError: a deadlock, a message that nobody takes, or messages taken in another order than sent.
    """
    done: dict[tuple[str, int], dict[str, list[_At]]] = {}  # link -> role -> where, in order
    position = [0] * len(programs)

    def fail(rule: str) -> ScheduleError:
        return ScheduleError(f"{rule}\n{_marked(dict(enumerate(programs)), dict(enumerate(position)))}")

    def can_run(stage: int, op: Op) -> bool:
        if op.kind.is_compute:
            return True
        direction, offset, role = _LINKS[op.kind]
        link = done.setdefault((direction, stage + offset), {"send": [], "expect": [], "receive": []})
        number = len(link[role])
        if role == "send":
            slack = gradients_on_wire[stage] - 1 if direction == "gradient" else 0
            if number - slack >= len(link["expect"]):
                return False
        elif role == "receive":
            if number >= len(link["expect"]):
                raise fail(f"stage {stage} waits at {op} for a receive that it has not posted")
            if number >= len(link["send"]):
                return False
            if link["send"][number].index != op.index:
                raise fail(f"stage {stage} takes {op} where {link['send'][number].index} was sent")
        link[role].append(_At(op.index, stage, position[stage]))
        return True

    moving = True
    while moving:
        moving = False
        for stage, program in enumerate(programs):
            while position[stage] < len(program) and can_run(stage, program[position[stage]]):
                position[stage] += 1
                moving = True
    if any(at < len(program) for at, program in zip(position, programs, strict=True)):
        raise fail("deadlock: every stage waits for another one at the marked op")
    for (direction, sender), link in done.items():
        counts = {role: len(where) for role, where in link.items()}
        if len(set(counts.values())) > 1:
            left_over = max(link.values(), key=len)[min(counts.values())]
            position[left_over.stage] = left_over.position
            raise fail(
                f"the {direction} link of stage {sender} ends with {counts['send']} sends, {counts['expect']} posted "
                f"receives and {counts['receive']} taken ones"
            )


class _At(NamedTuple):
    """Where an op of a link stands."""

    index: int
    stage: int
    position: int


def _marked(rows: dict[int, Program], marks: dict[int, int], context: int = 6) -> str:
    """The rows as a text grid, `context` ops either side of the marked one, which stands in >...<."""
    lines = []
    for stage, ops in rows.items():
        mark = marks[stage]
        window = range(max(0, mark - context), min(len(ops), mark + context + 1))
        cells = [f">{ops[at]}<" if at == mark else str(ops[at]) for at in window]
        lines.append(
            f"  stage {stage:<3} "
            + ("... " if window.start else "")
            + " ".join(cells)
            + (" ..." if window.stop < len(ops) else "")
        )
    return "\n".join(lines)

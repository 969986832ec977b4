"""Whether compute ops are PACI's stream: what the tests hold its generator to."""

from paci_schedule import ScheduleError
from paci_schedule.check.validate import check_messages
from paci_schedule.core import grid
from paci_schedule.core.drift import DriftMeter, drift_bound, drift_of
from paci_schedule.core.ops import OpKind
from paci_schedule.core.schedules.paci import Paci


def check_segments(spec, segments):
    """Check segments that begin and end with an empty pipe: every stage's stream, and the links between them.

    Raises:
        ScheduleError: naming the first violation and showing the grid.
    """
    for stage in range(spec.stages):
        ops = []
        for segment in segments:
            if segment.start == 0:
                check_stream(spec, stage, ops)
                ops = []
            ops.extend(segment.ops(stage))
        check_stream(spec, stage, ops)
    check_messages(Paci(), spec, segments)


def check_stream(spec, stage, ops):
    """Check one stage's compute ops, from an empty pipe to an empty pipe.

    Every micro-batch has one F and then one B, in micro-batch order; every a-th B is followed by its STEP; drift equals
    the closed form and, like the micro-batches in flight, stays within its bound.

    Raises:
        ScheduleError: naming the op, the rule and showing the stream.
    """
    meter, forwards, backwards = DriftMeter(), 0, 0

    def fail(position, rule):
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

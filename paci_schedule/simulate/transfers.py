"""Run the stages' programs with their messages, on links whose transfers begin when both ends are there.

`execute.py` lets a message go as soon as it is made.  On NCCL a message goes only when its receive is posted as well,
so the order of the programs (`core.lower`) counts: a receive that is posted late delays its message.

* A transfer begins when the message is sent, its receive is posted and the link is free.  It occupies the link for
  bytes / bandwidth, and the message arrives one latency later.
* A send waits until the message has arrived that used its buffer before (`Schedule.gradients_on_wire`).
* Posting, sending and receiving cost the stage nothing; sums of tied weights are left out.
"""

from __future__ import annotations

from paci_schedule.core.lower import Lowering
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.execute import check_size, durations
from paci_schedule.simulate.timeline import Span, Timeline

__all__ = ["simulate_transfers"]

_DOWN = OpKind.EXPECT_ACTIVATION, OpKind.SEND_ACTIVATION, OpKind.RECV_ACTIVATION


class _Wire:
    """One direction of a link; times by the number of the message.

    Args:
        latency, transfer: of a message.
        buffers: how many messages may be under way.
    """

    def __init__(self, latency: float, transfer: float, buffers: int) -> None:
        self.latency, self.transfer, self.buffers = latency, transfer, buffers
        self.posted: list[float] = []
        self.sent: list[float] = []
        self.there: list[float] = []
        self.taken = 0
        self._free = 0.0

    def move(self) -> None:
        """Begin the transfers whose ends are both there."""
        for number in range(len(self.there), min(len(self.posted), len(self.sent))):
            self._free = max(self._free, self.posted[number], self.sent[number]) + self.transfer
            self.there.append(self._free + self.latency)


def simulate_transfers(
    schedule: Schedule, spec: PipelineSpec, costs: Costs, batches: int = 1, *, early_receives: bool = False
) -> Timeline:
    """The timeline of `batches` batches, from an empty pipe to an empty pipe, beginning at 0.

    Args:
        schedule: which schedule; with one chunk a stage.
        spec: the pipeline.
        costs: what things take.
        batches: how many.
        early_receives: whether receives of gradients are posted before F (`core.lower`).

    Raises:
        ConfigError: `costs.sync` is set, the schedule has several chunks a stage, a list of costs has another length
            than the stages, or there is too much to simulate.
    """
    check_size(schedule, spec, batches)
    if costs.sync is not None:
        raise ConfigError(f"sync={costs.sync}: transfers are simulated without it; leave it out, or use simulate()")
    if schedule.chunks > 1:
        raise ConfigError(
            f"schedule={schedule.name}: its messages are known only for one chunk a stage, not for {schedule.chunks}; "
            "use simulate()"
        )
    programs: list[list[Op]] = []
    calls: list[list[int]] = []
    for stage in range(spec.stages):
        lowering = Lowering(schedule, spec, stage, early_receives=early_receives)
        programs.append([])
        calls.append([])
        flushed = 0  # micro-batches before this batch, where every batch counts its own from 0
        for call in schedule.run(spec, batches):
            programs[-1].extend(_later(op, flushed, spec.accumulation) for op in lowering.program(call))
            flushed += spec.accumulation * schedule.flushes
            calls[-1].append(sum(op.kind.is_compute for op in programs[-1]))
    return Timeline(_run(schedule, spec, programs, costs), calls)


def _later(op: Op, micro_batches: int, accumulation: int) -> Op:
    """The op, counted on from so many micro-batches."""
    return op._replace(index=op.index + micro_batches // (accumulation if op.kind is OpKind.STEP else 1))


def _run(schedule: Schedule, spec: PipelineSpec, programs: list[list[Op]], costs: Costs) -> list[list[Span]]:
    takes = durations(schedule, programs, costs)
    links = list(zip(costs.latencies(spec.stages).tolist(), costs.transfers(spec.stages).tolist(), strict=True))
    buffers = [schedule.gradients_on_wire(spec, stage) for stage in range(1, spec.stages)]
    down = [_Wire(*links[low], 1) for low in range(spec.stages - 1)]
    up = [_Wire(*links[low], count) for low, count in enumerate(buffers)]
    now, position = [0.0] * spec.stages, [0] * spec.stages
    rows: list[list[Span]] = [[] for _ in programs]

    def do(stage: int, op: Op) -> bool:
        """One op, if it can be done yet."""
        if op.kind.is_compute:
            start = now[stage]
            now[stage] += takes(stage, op)
            rows[stage].append(Span(op, start, now[stage]))
            return True
        goes_down = op.kind in _DOWN
        sends = op.kind in (OpKind.SEND_ACTIVATION, OpKind.SEND_GRADIENT)
        wire = (down if goes_down else up)[stage - (goes_down != sends)]
        if op.kind in (OpKind.EXPECT_ACTIVATION, OpKind.EXPECT_GRADIENT):
            wire.posted.append(now[stage])
        else:
            number = len(wire.sent) - wire.buffers if sends else wire.taken
            if number >= len(wire.there):
                return False
            if number >= 0:
                now[stage] = max(now[stage], wire.there[number])
            if sends:
                wire.sent.append(now[stage])
            else:
                wire.taken += 1
        wire.move()
        return True

    moving = True
    while moving:
        moving = False
        for stage, program in enumerate(programs):
            while position[stage] < len(program) and do(stage, program[position[stage]]):
                position[stage] += 1
                moving = True
    assert all(at == len(program) for at, program in zip(position, programs, strict=True)), "a deadlock"
    return rows

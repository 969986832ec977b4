"""Compute ops to a stage's whole program: where it posts receives, waits for them, and sends.

* A receive is posted (EA, EG) before the compute op that precedes its consumer, steps not counted, so that the transfer
  overlaps that op; it is waited for (RA, RG) right before its consumer.
* A send (SA, SG) starts right after the op that made its content, and goes on behind the next ops.  Buffers are
  bounded: before it starts, the activation before it, or the gradient `PipelineSpec.gradients_on_wire` before it, must
  be done.
* A message crosses from one segment to the next without keeping a wire busy in between.  A gradient that its receiver
  takes only in the next segment (lagging cut) is sent at the start of that segment; an activation that its receiver
  needs only then (leading cut) is received at the end of this one, because its sender comes back a backward later than
  its receiver.  Nothing is on the wire, and no receive is posted, while the caller has control: a device
  synchronisation, an evaluation or an exit between two calls finds quiet links.

The program is safe even on links that buffer nothing, where a send blocks until its receive is posted
(`validate.check_rendezvous`).
"""

from __future__ import annotations

from collections.abc import Iterator

from paci_schedule.ops import Op, OpKind
from paci_schedule.schedules.paci import Segment

__all__ = ["lower"]


def lower(segment: Segment, stage: int) -> Iterator[Op]:
    """The program of `stage` for `segment`: its compute ops with its messages between them, in order."""
    spec, rounds = segment.spec, segment.rounds(stage)
    first, last = stage == 0, stage == spec.stages - 1
    ahead = spec.look_ahead(stage)
    above = range(0) if first else segment.rounds(stage - 1)
    above_ahead = 0 if first else spec.look_ahead(stage - 1)

    def expect(op: Op) -> Iterator[Op]:
        if op.kind is OpKind.FORWARD and op.index in above:
            yield Op(OpKind.EXPECT_ACTIVATION, op.index)
        elif op.kind is OpKind.BACKWARD and not last:
            yield Op(OpKind.EXPECT_GRADIENT, op.index)

    def receive(op: Op) -> Iterator[Op]:
        if op.kind is OpKind.FORWARD and op.index in above:
            yield Op(OpKind.RECV_ACTIVATION, op.index)
        elif op.kind is OpKind.BACKWARD and not last:
            yield Op(OpKind.RECV_GRADIENT, op.index)

    def send(op: Op) -> Iterator[Op]:
        if op.kind is OpKind.FORWARD and not last:
            yield Op(OpKind.SEND_ACTIVATION, op.index)
        elif op.kind is OpKind.BACKWARD and op.index + above_ahead < above.stop:
            yield Op(OpKind.SEND_GRADIENT, op.index)

    def carried() -> Iterator[Op]:
        due = range(above.start - above_ahead, above.stop - above_ahead)
        for index in range(max(0, due.start), min(due.stop, rounds.start - ahead, segment.admitted)):
            yield Op(OpKind.SEND_GRADIENT, index)

    early = [Op(OpKind.FORWARD, index) for index in range(rounds.stop, min(above.stop, segment.admitted))]
    ops = list(segment.ops(stage))
    coming = [op for op in (*ops, *early) if op.kind is not OpKind.STEP]
    if coming:
        yield from expect(coming[0])
    yield from carried()
    following = iter(coming[1:])
    for position, op in enumerate((*ops, *early)):
        if op.kind is not OpKind.STEP:
            upcoming = next(following, None)
            if upcoming is not None:
                yield from expect(upcoming)
        yield from receive(op)
        if position < len(ops):
            yield op
            yield from send(op)

"""Compute ops to a stage's whole program: where it posts receives, waits for them, sends, and posts sums.

Round i of a stage is F(i), then B(i - d); let k be the rounds of slack of the link to the next stage.

    gap before F(i)    ... RA(i)                           wait for the activation
    gap after F(i)     SA(i)  EG(i-d+k)  EA(i+1)  RG(i-d)
    gap after B(i-d)   SG(i-d)  [STEP]  RA(i+1)

* The receive of an activation is posted (EA) before the compute op that precedes its F, so that the transfer overlaps
  that op; in rounds without a B that is the F before.
* The receive of a gradient is posted (EG) where the next stage sends it: in the gap after F(i), when that stage ends
  its round i - 1.  With slack the transfer is then hidden for k rounds; without, RG follows at once.
* A send (SA, SG) starts right after the op that made its content, and goes on next_ahead the next ops.  Buffers are
  bounded: before it starts, the activation before it, or the gradient `PipelineSpec.gradients_on_wire` before it, must
  be done.
* What is posted or sent in one segment is sent or posted in it, or was before: between two calls a device
  synchronisation, an evaluation or an exit waits for nobody.  So the gradient of a stage's last round under the lagging
  cut, whose receive the stage before posts in its next round, is sent at the start of the next segment; under the
  leading cut receives of gradients that are made only in the next segment are posted at its start, and an activation
  that its receiver needs only then is received at the end of this one.

Every compute op of this order may wait for the whole device: on NCCL a posted receive is a running kernel, and such an
op then ends only when the other stage has sent.  Both ends of a link do "activation down, then gradient up", so nobody
waits in a circle, not even where every op does so (CUDA_LAUNCH_BLOCKING=1).  `rendezvous.check_rendezvous` proves it.

With `early_receives` the receive of a gradient, too, is posted one compute op earlier, before F(i).  A stage whose F
takes longer than the next stage's B then finds the gradient there; but F(i) waits for the next stage's B, which waits
for SA(i), if ops wait for the device: a deadlock.

Between these ops stand the postings of tied weights' sums (SUM, `sums`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.paci import Segment
from paci_schedule.core.sums import Sums

__all__ = ["lower"]

_RECEIVED = {OpKind.FORWARD: OpKind.RECV_ACTIVATION, OpKind.BACKWARD: OpKind.RECV_GRADIENT}


def lower(
    segment: Segment, stage: int, *, ties: Sequence[Sequence[int]] = (), early_receives: bool = False
) -> Iterator[Op]:
    """The program of `stage` for `segment`: its compute ops with its messages and sums between them, in order.

    Args:
        segment: what all stages do.
        stage: which of them.
        ties: for each tied weight, the stages that hold a copy.  A sum's `chunk` is the number of its tie.
        early_receives: post the receives of gradients before F instead of after it; deadlocks where an op waits for
            the device.
    """
    program = _program(segment, stage, Sums(segment, stage, ties))
    return _posted_early(program) if early_receives else program


def _program(segment: Segment, stage: int, sums: Sums) -> Iterator[Op]:
    spec, rounds = segment.spec, segment.rounds(stage)
    ahead, accumulation = spec.look_ahead(stage), spec.accumulation
    above = segment.rounds(stage - 1) if stage else range(0)
    incoming = range(above.start, min(above.stop, segment.admitted))
    expected, sent = _gradients(segment, stage), _gradients(segment, stage - 1)
    next_ahead = ahead - 1 if stage == spec.stages - 1 else spec.look_ahead(stage + 1)

    def expect_activation(index: int) -> Iterator[Op]:
        if index in incoming:
            yield Op(OpKind.EXPECT_ACTIVATION, index)

    yield from sums.at_begin
    yield from expect_activation(rounds.start)
    for index in expected[: max(0, rounds.start - next_ahead - 1 - expected.start)]:
        yield Op(OpKind.EXPECT_GRADIENT, index)
    for index in sent[: max(0, rounds.start - ahead - sent.start)]:
        yield Op(OpKind.SEND_GRADIENT, index)
    for index in rounds:
        forward, backward = index < segment.admitted, index - ahead
        has_backward = 0 <= backward < segment.admitted
        yield from sums.at_start[index]
        if forward:
            if not has_backward:
                yield from expect_activation(index + 1)
            if index in incoming:
                yield Op(OpKind.RECV_ACTIVATION, index)
            yield Op(OpKind.FORWARD, index)
            if stage < spec.stages - 1:
                yield Op(OpKind.SEND_ACTIVATION, index)
        if index - next_ahead - 1 in expected:
            yield Op(OpKind.EXPECT_GRADIENT, index - next_ahead - 1)
        yield from sums.after_forward[index]
        if has_backward:
            yield from expect_activation(index + 1)
            if stage < spec.stages - 1:
                yield Op(OpKind.RECV_GRADIENT, backward)
            yield Op(OpKind.BACKWARD, backward)
            if backward in sent:
                yield Op(OpKind.SEND_GRADIENT, backward)
            if (backward + 1) % accumulation == 0:
                yield Op(OpKind.STEP, backward // accumulation)
                yield from sums.after_step[index]
    for index in incoming[max(0, rounds.stop - incoming.start) :]:
        if index > rounds.stop:
            yield from expect_activation(index)
        yield from sums.at_start[index]
        yield Op(OpKind.RECV_ACTIVATION, index)
        yield from sums.after_forward[index]
    yield from sums.at_end


def _gradients(segment: Segment, stage: int) -> range:
    """The gradients whose receive `stage` posts in this segment, and which the next stage sends in it."""
    spec = segment.spec
    if not 0 <= stage < spec.stages - 1:
        return range(0)
    shift = 0 if segment.leading else spec.look_ahead(stage + 1) + 1
    start = max(0, segment.start - shift)
    return range(start, max(start, min(segment.stop - shift, segment.admitted)))


def _posted_early(program: Iterator[Op]) -> Iterator[Op]:
    """Each posting of a gradient's receive before the F or B that precedes it, and before what that waits for."""
    ops: list[Op] = []
    at = 0
    for op in program:
        if op.kind is OpKind.EXPECT_GRADIENT:
            ops.insert(at, op)
            at += 1
        else:
            if op.kind in _RECEIVED:
                at = len(ops) - (ops[-1:] == [Op(_RECEIVED[op.kind], op.index)])
            ops.append(op)
    yield from ops

"""The whole program of a stage: its compute ops of one call, with its messages and sums between them.

A schedule says only what a stage computes, and in which order.  Four passes add the rest.  They look at the compute ops
of the stage and of its two neighbours, and at nothing else, so they serve every schedule with one chunk a stage:

* *Pair sends and receives.*  A stage waits for an activation (RA) right before the F that takes it, and for a gradient
  (RG) right before its B.  A send (SA, SG) starts right after the op that made its content.
* *Keep links quiet between calls.*  What one stage sends in a call, its neighbour receives in the same call, so that a
  device synchronisation, an evaluation or an exit between two calls waits for nobody (`Link`).
* *Post early.*  The receive of an activation is posted (EA) before the F or B that precedes its F, so that the transfer
  overlaps that op.  The receive of a gradient is posted (EG) where the next stage can send it: after the first
  activation that the next stage takes only after that gradient's B.  Where several gradients may be on the wire (slack,
  `Schedule.gradients_on_wire`), the transfer is then hidden; else the wait follows at once.
* *Place the sums of tied weights* (SUM, `sums`).

For 1F1B and PACI the gaps between the compute ops then look like this; k is the slack of the link to the next stage:

    gap before F(i)    ... RA(i)
    gap after F(i)     SA(i)  EG(i-d+k)  EA(i+1)  RG(i-d)
    gap after B(i-d)   SG(i-d)  [STEP]  RA(i+1)

A send goes on next to the ops that follow.  Buffers are bounded: before a send starts, the activation before it, or the
gradient `gradients_on_wire` before it, must be done.

Every compute op of this order may wait for the whole device: on NCCL a posted receive is a running kernel, and such an
op then ends only when the other stage has sent.  Both ends of a link do "activation down, then gradient up", so nobody
waits in a circle, not even where every op does so (CUDA_LAUNCH_BLOCKING=1).  `check.rendezvous` proves it.

With `early_receives` the receive of a gradient, too, is posted one compute op earlier, before F(i).  A stage whose F
takes longer than the next stage's B then finds the gradient there.  But F(i) then waits for the next stage's B, which
waits for SA(i), if ops wait for the device: a deadlock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from paci_schedule.core.link import EMPTY, Exchange, Link
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.places import Place, Program
from paci_schedule.core.schedules.base import Call, Rounds, Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.core.sums import place_sums

__all__ = ["Lowering"]

_RECEIVED = {OpKind.FORWARD: OpKind.RECV_ACTIVATION, OpKind.BACKWARD: OpKind.RECV_GRADIENT}


class Lowering:
    """The programs of one stage, call by call; it begins with an empty pipe and remembers what its links hold.

    Args:
        schedule: what all stages run.
        spec: the pipeline.
        stage: which of them.
        ties: for each tied weight, the stages that hold a copy.  A sum's `chunk` is the number of its tie.  Under a
            schedule that flushes an update waits for its own sums, and none is placed here.
        early_receives: post the receives of gradients before F instead of after it; deadlocks where an op waits for
            the device.
    """

    def __init__(
        self,
        schedule: Schedule,
        spec: PipelineSpec,
        stage: int,
        *,
        ties: Sequence[Sequence[int]] = (),
        early_receives: bool = False,
    ) -> None:
        self._stage, self._early = stage, early_receives
        self._ties = () if schedule.flushes else ties
        self._above = Link(schedule.gradients_on_wire(spec, stage)) if stage else None
        self._below = Link(schedule.gradients_on_wire(spec, stage + 1)) if stage < spec.stages - 1 else None

    def program(self, call: Call) -> list[Op]:
        """The program of the next call: its compute ops with the messages and sums between them, in order."""
        program = Program(list(call.ops(self._stage)))
        above = below = EMPTY
        if self._above is not None:
            above = self._above.exchange(call.ops(self._stage - 1), program.ops)
        if self._below is not None:
            below = self._below.exchange(program.ops, call.ops(self._stage + 1))
        _pair(program, above, below)
        _post_activations(program, above)
        _post_gradients(program, below)
        if self._ties:
            place_sums(program, cast(Rounds, call), self._stage, self._ties)  # no flushes: it runs in rounds
        if call.finished == call.taken:
            for link in (self._above, self._below):
                if link is not None:
                    link.empty()
        return _posted_early(program) if self._early else list(program)


def _pair(program: Program, above: Exchange, below: Exchange) -> None:
    """Sends, and the waits for what is received."""
    for index in above.activations:
        at = program.position(OpKind.FORWARD, index)
        receive = Op(OpKind.RECV_ACTIVATION, index)
        if at is None:  # its F is in a later call
            program.add(receive, program.end, Place.PARKED, (index, 2))
        else:
            program.add(receive, at, Place.RECEIVE)
    for gradient in above.gradients:
        at = program.position(OpKind.BACKWARD, gradient.index)
        program.add(Op(OpKind.SEND_GRADIENT, gradient.index), program.begin if at is None else at + 1, Place.SEND)
    for index in below.activations:
        program.add(Op(OpKind.SEND_ACTIVATION, index), program.at(OpKind.FORWARD, index) + 1, Place.SEND)
    for index in below.needed:
        program.add(Op(OpKind.RECV_GRADIENT, index), program.at(OpKind.BACKWARD, index), Place.RECEIVE)


def _post_activations(program: Program, above: Exchange) -> None:
    """Postings of the receives of activations, before the F or B that precedes the wait."""
    for index in above.activations:
        at, post = program.position(OpKind.FORWARD, index), Op(OpKind.EXPECT_ACTIVATION, index)
        if at is None and index != above.next_forward:  # it waits behind another one that is parked
            program.add(post, program.end, Place.PARKED, (index, 0))
        else:
            program.add(post, program.before(program.end if at is None else at), Place.POST_ACTIVATION)


def _post_gradients(program: Program, below: Exchange) -> None:
    """Postings of the receives of gradients, where the next stage can send them."""
    for gradient in below.gradients:
        at, place = program.position(OpKind.FORWARD, gradient.after), Place.POST_GRADIENT
        if at is not None:
            at += 1
        elif not gradient.is_late and gradient.before is not None:
            at, place = program.position(OpKind.BACKWARD, gradient.before), Place.POST_LAST_GRADIENT
        program.add(Op(OpKind.EXPECT_GRADIENT, gradient.index), program.begin if at is None else at, place)


def _posted_early(program: Iterable[Op]) -> list[Op]:
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
    return ops

"""When the stages post the sum of a tied weight's gradients: all of them at the same moment of the stream.

The gradients of update k are summed over the stages that hold a copy.  The first of these stages, f, is the last to
have its gradients, with STEP k in round R = (k+1) a - 1 + d_f; the others keep theirs until then.  "Until then" is
measured in levels (see `simulate.wavefront`): what stage s does between F(i) and B(i - d) has the level s + 2i, what it
does after that B has the level s + 2i + 1, and no stage ever waits for a higher level than its own.  So stage f posts
the sum at the level f + 2R + 1, right after its STEP, and stage f + n posts it at the same level:

    n odd     after F(R - (n-1)/2)
    n even    at the start of round R + 1 - n/2

There no copy waits long for the others, and no copies wait in a circle, even if each waits for its device.  (If all
posted in the same round R, the copies of a weight on three stages would wait in a circle under launch blocking.)  The
calls of the training loop shift this: a sum is posted by all stages in the same call, so that no stage waits between
two calls.

* Under the lagging cut the sum is posted in the call of round R.  A stage whose level lies in the call before posts it
  at the very beginning.
* Under the leading cut update k of stage f follows call k, so the sum is posted in call k + 1: by f at the start of its
  first round, and by a stage whose level lies in a later call between the activations received at the end, or after
  them.  The sum of the update after the call that empties the pipe is posted in that call.

In every case that is before the first STEP that applies the sum (`runtime.deferred.tied`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.places import Place, Program
from paci_schedule.core.schedules.base import Rounds

__all__ = ["place_sums"]


def place_sums(program: Program, call: Rounds, stage: int, ties: Sequence[Sequence[int]]) -> None:
    """Put the sums into the program of a stage.

    Args:
        program: of the stage, for the call.
        call: what all stages do.
        stage: which of them.
        ties: for each tied weight, the stages that hold a copy.
    """
    sums = []
    for number, holders in enumerate(ties):
        if stage in holders:
            first = min(holders)
            sums += [(first + 2 * end, -first, number, end) for end in _last_rounds(call, first)]
    rounds = _Rounds(program, call, stage)
    # By level; of equal levels the one first whose first copy's stage is later, for that stage's own sum is.
    for _, first, number, end in sorted(sums):
        update = (end + 1 - call.spec.look_ahead(-first)) // call.spec.accumulation - 1
        rounds.put(Op(OpKind.SUM, update, number), end, stage + first)
    if call.leading and call.taken == call.finished:
        last = call.finished // call.spec.accumulation - 1
        for number, holders in enumerate(ties):
            if stage in holders:
                program.add(Op(OpKind.SUM, last, number), program.end, Place.SUM_AT_END)


def _last_rounds(call: Rounds, first: int) -> Iterator[int]:
    """The rounds R of stage `first` whose updates' sums are posted in this call."""
    ahead, rounds = call.spec.look_ahead(first), call.rounds(first)
    if call.leading:
        if rounds.start:
            yield rounds.start - 1
        return
    for index in rounds:
        done = index + 1 - ahead
        if 0 < done <= call.taken and done % call.spec.accumulation == 0:
            yield index


class _Rounds:
    """The rounds of one stage in one call, as places in its program."""

    def __init__(self, program: Program, call: Rounds, stage: int) -> None:
        self._program, self._call, self._ahead = program, call, call.spec.look_ahead(stage)
        self._rounds, self._above = call.rounds(stage), call.rounds(stage - 1) if stage else range(0)

    def put(self, op: Op, end: int, distance: int) -> None:
        """Put in a sum that the stage of the first copy, so many stages before this one, posts in its round `end`."""
        if not distance:
            if self._call.leading:
                self._at_start(op, self._rounds.start)
            else:
                self._after_step(op, end)
            return
        put, index = self._after_forward, end - (distance - 1) // 2
        if distance % 2 == 0:
            put, index = self._at_start, end + 1 - distance // 2
        if index < self._rounds.start:
            self._program.add(op, self._program.begin, Place.SUM_AT_START)
        elif index < self._rounds.stop:
            put(op, index)
        # The activations of the stage before, from rounds.stop on, are received at the end of the call.
        elif index < self._above.start:
            self._after_step(op, self._rounds.stop - 1)
        elif index < min(self._above.stop, self._call.taken):
            put(op, index)
        else:
            self._program.add(op, self._program.end, Place.SUM_AT_END)

    def _at_start(self, op: Op, index: int) -> None:
        forward, at = self._find(index)
        self._add(op, at if forward is None else forward, Place.SUM_AT_START, (index, 1))

    def _after_forward(self, op: Op, index: int) -> None:
        """After the F of the round, or where it would be."""
        forward, at = self._find(index)
        if forward is not None:
            self._program.add(op, forward + 1, Place.SUM_AFTER_FORWARD)
        else:
            self._add(op, at, Place.SUM_WITHOUT_FORWARD, (index, 3))

    def _after_step(self, op: Op, index: int) -> None:
        update = (index - self._ahead) // self._call.spec.accumulation
        self._program.add(op, self._program.at(OpKind.STEP, update) + 1, Place.SUM_AFTER_STEP)

    def _find(self, index: int) -> tuple[int | None, int | None]:
        """Where the F and the B of a round stand."""
        position = self._program.position
        return position(OpKind.FORWARD, index), position(OpKind.BACKWARD, index - self._ahead)

    def _add(self, op: Op, at: int | None, place: Place, order: tuple[int, int]) -> None:
        """In a round with neither F nor B it goes to the end, between the activations that are received there."""
        if at is None:
            self._program.add(op, self._program.end, Place.PARKED, order)
        else:
            self._program.add(op, at, place)

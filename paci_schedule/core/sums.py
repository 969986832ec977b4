"""When the stages post the sums of a tied weight's gradients: all at the same moment of the stream.

The gradients of update k are summed over the stages that hold a copy.  The first of them, f, has them last, with STEP k
in round R = (k+1) a - 1 + d_f; the others hold their part until then.  "Then" is a level (see `wavefront`): what stage
s does between F(i) and B(i - d) has the level s + 2i, what it does after that B the level s + 2i + 1, and nobody waits
for a higher level than its own.  So f posts the sum at the level f + 2R + 1, right after its STEP, and so does f + n:

    n odd     after F(R - (n-1)/2)
    n even    at the start of round R + 1 - n/2

where no copy waits long for the others, and none in a circle, even if it waits for its device.  (In one and the same
round R, the copies of a weight on three stages would wait in a circle under launch blocking.)  A call of the training
loop moves this: what is posted in one call is posted by all in the same call, so that nobody waits between two.

* Lagging cut: in the call of round R.  Where the level lies in the call before, at the very beginning.
* Leading cut: f's update k follows call k, so in call k + 1: f at the start of its first round, and where the level
  lies in a later call, between the activations received at the end, or after them.  The sum of the update after the
  call that empties the pipe is posted with it.

In any case that is before the first STEP that applies the sum (`runtime.tied`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.paci import Segment

__all__ = ["Sums"]


class Sums:
    """The sums that one stage posts in one segment.

    Args:
        segment: what all stages do.
        stage: which of them.
        ties: for each tied weight, the stages that hold a copy.

    Attributes:
        at_begin, at_end: before the first message of the segment, and after the last one.
        at_start, after_forward, after_step: by round, at its start, after its F or where that would be, after its STEP.
    """

    def __init__(self, segment: Segment, stage: int, ties: Sequence[Sequence[int]]) -> None:
        self._segment, self._stage = segment, stage
        self.at_begin: list[Op] = []
        self.at_end: list[Op] = []
        self.at_start: defaultdict[int, list[Op]] = defaultdict(list)
        self.after_forward: defaultdict[int, list[Op]] = defaultdict(list)
        self.after_step: defaultdict[int, list[Op]] = defaultdict(list)
        sums = []
        for number, holders in enumerate(ties):
            if stage in holders:
                first = min(holders)
                sums += [(first + 2 * end, -first, number, end) for end in self._last_rounds(first)]
        # By level; of equal levels the one first whose first copy's stage is later, for that stage's own sum is.
        for _, first, number, end in sorted(sums):
            update = (end + 1 - segment.spec.look_ahead(-first)) // segment.spec.accumulation - 1
            self._place(end, stage + first).append(Op(OpKind.SUM, update, number))
        if segment.leading and segment.admitted <= segment.stop:
            last = segment.stop // segment.spec.accumulation - 1
            self.at_end += [Op(OpKind.SUM, last, number) for number, holders in enumerate(ties) if stage in holders]

    def _last_rounds(self, first: int) -> Iterator[int]:
        """The rounds R of `first` whose updates' sums are posted in this segment."""
        segment, ahead = self._segment, self._segment.spec.look_ahead(first)
        if segment.leading:
            if segment.start:
                yield segment.start - 1 + ahead
            return
        for index in range(segment.start, segment.stop):
            done = index + 1 - ahead
            if 0 < done <= segment.admitted and done % segment.spec.accumulation == 0:
                yield index

    def _place(self, end: int, distance: int) -> list[Op]:
        """Where the sum of an update goes that the first copy's stage, so many stages before, does in round `end`."""
        rounds, leading = self._segment.rounds(self._stage), self._segment.leading
        if not distance:
            return self.at_start[rounds.start] if leading else self.after_step[end]
        places, index = self.after_forward, end - (distance - 1) // 2
        if distance % 2 == 0:
            places, index = self.at_start, end + 1 - distance // 2
        if index < rounds.start:
            return self.at_begin
        if index < rounds.stop:
            return places[index]
        above = self._segment.rounds(self._stage - 1)  # its activations from rounds.stop on are received at the end
        if index < above.start:
            return self.after_step[rounds.stop - 1]
        return places[index] if index < min(above.stop, self._segment.admitted) else self.at_end

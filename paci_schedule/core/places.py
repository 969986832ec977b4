"""A program under construction: compute ops in their order, and what passes put into the gaps between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum

from paci_schedule.core.ops import Op, OpKind

__all__ = ["Place", "Program"]


class Place(IntEnum):
    """The order of things in one gap: what follows the compute op before it, then what precedes the one after it."""

    SEND = 0
    POST_GRADIENT = 1
    SUM_AFTER_FORWARD = 2
    SUM_AFTER_STEP = 3
    SUM_AT_START = 4
    POST_LAST_GRADIENT = 5
    SUM_WITHOUT_FORWARD = 6
    POST_ACTIVATION = 7
    RECEIVE = 8
    PARKED = 9  # activations at the end of a call whose F is in a later one: posted (0), taken (2), sums around that
    SUM_AT_END = 10


_BEGIN = {Place.SUM_AT_START: 0, Place.POST_ACTIVATION: 1, Place.POST_GRADIENT: 2, Place.SEND: 3}


class Program:
    """The program of one stage for one call.  Iterating gives its ops in order.

    Args:
        ops: the compute ops.

    Attributes:
        ops: the compute ops.
        begin, end: the gap before everything else, and the one after the last compute op.
    """

    begin = -1

    def __init__(self, ops: Sequence[Op]) -> None:
        self.ops = ops
        self.end = len(ops)
        self._position = {(op.kind, op.index): at for at, op in enumerate(ops)}
        self._gaps: dict[int, list[tuple[int, tuple[int, int], Op]]] = {}

    def position(self, kind: OpKind, index: int) -> int | None:
        """Where the compute op stands, which is also the number of the gap before it; None for none in this call."""
        return self._position.get((kind, index))

    def at(self, kind: OpKind, index: int) -> int:
        """The position of a compute op that is in this call for certain."""
        return self._position[kind, index]

    def before(self, at: int) -> int:
        """The gap before the F or B that precedes position `at`; the begin where there is none."""
        while at > 0:
            at -= 1
            if self.ops[at].kind in (OpKind.FORWARD, OpKind.BACKWARD):
                return at
        return self.begin

    def add(self, op: Op, gap: int, place: Place, order: tuple[int, int] = (0, 0)) -> None:
        """Put `op` into the gap before compute op `gap`; in one place by `order`, and behind what has the same."""
        rank = _BEGIN[place] if gap == self.begin else place
        self._gaps.setdefault(gap, []).append((rank, order, op))

    def __iter__(self) -> Iterator[Op]:
        for gap in range(self.begin, self.end + 1):
            for _, _, op in sorted(self._gaps.get(gap, ()), key=lambda added: added[:2]):
                yield op
            if 0 <= gap < self.end:
                yield self.ops[gap]

"""One link between two neighbouring stages over the calls of a training loop: which messages cross it in which call."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from paci_schedule.core.ops import Op, OpKind

__all__ = ["EMPTY", "Exchange", "Gradient", "Link"]


class Gradient(NamedTuple):
    """A gradient that crosses the link in this call.

    Attributes:
        index: its micro-batch.
        after: the first activation that the lower stage takes only after this gradient's B.  The upper stage posts the
            receive after it has sent that activation.
        is_late: that activation was sent in an earlier call.
        before: where no such activation is sent any more, the upper stage posts the receive before the B of this
            micro-batch, which is the one that empties a buffer; None if that B was in an earlier call.
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]: it hides tuple.index, which nobody calls
    after: int
    is_late: bool
    before: int | None


class Exchange(NamedTuple):
    """What crosses a link in one call, in order.

    Attributes:
        activations: micro-batches.
        gradients: in the order in which the lower stage makes them.
        needed: micro-batches whose gradient the upper stage uses in this call.
        next_forward: the micro-batch of the lower stage's first F after this call.
    """

    activations: list[int]
    gradients: list[Gradient]
    needed: list[int]
    next_forward: int


EMPTY = Exchange([], [], [], 0)
"""The exchange of a stage without such a neighbour."""


class Link:
    """The messages between an upper stage and the lower one after it, call by call, from an empty pipe on.

    What crosses in a call is sent and received in it.  An activation crosses in the call of the upper stage's F, even
    if the lower stage needs it only in a later one.  A gradient crosses in the first call in which it has been made and
    the upper stage has sent the activation after which it posts the receive, or needs the gradient.

    Args:
        gradients_on_wire: how many gradients may be on the way at once.
    """

    def __init__(self, gradients_on_wire: int) -> None:
        self._slack = gradients_on_wire - 1
        self.empty()

    def empty(self) -> None:
        """The pipe is empty: micro-batches count from 0 again."""
        self._sent = self._taken = 0  # forwards of the upper and of the lower stage
        self._made: deque[tuple[int, int]] = deque()  # that have not crossed: micro-batch, forwards before its B
        self._crossed = self._used = 0  # gradients, and the upper stage's backwards

    def exchange(self, upper: Iterable[Op], lower: Iterable[Op]) -> Exchange:
        """What crosses the link in the next call, whose compute ops these are."""
        for op in lower:
            if op.kind is OpKind.FORWARD:
                self._taken += 1
            elif op.kind is OpKind.BACKWARD:
                self._made.append((op.index, self._taken))
        activations, needed = [], []
        for op in upper:
            if op.kind is OpKind.FORWARD:
                activations.append(op.index)
            elif op.kind is OpKind.BACKWARD:
                needed.append(op.index)
        earlier, self._sent = self._sent, self._sent + len(activations)
        gradients, wanted = [], set(needed)
        while self._made and (self._made[0][1] < self._sent or self._made[0][0] in wanted):
            index, after = self._made.popleft()
            frees = max(0, self._crossed - self._slack) - self._used
            before = needed[frees] if 0 <= frees < len(needed) else None
            gradients.append(Gradient(index, after, after < earlier, before))
            self._crossed += 1
        self._used += len(needed)
        return Exchange(activations, gradients, needed, self._taken)

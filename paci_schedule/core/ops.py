"""One thing that one pipeline stage does: forward, backward, weight gradient, optimizer step, message, or sum.

An op can be printed and parsed (``F3``, ``B0``, ``STEP1``, ``RA3``; ``F3.1`` for model chunk 1), so a schedule can be
written as text and read back.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple

from paci_schedule.errors import ScheduleError

__all__ = ["Op", "OpKind"]


class OpKind(str, Enum):
    """What an op does.  The value is the text that it is printed as."""

    FORWARD = "F"
    BACKWARD = "B"  # the whole backward, or only the input gradient where the schedule has W ops
    WEIGHT = "W"  # the weight gradient, where the schedule splits it from the backward
    STEP = "STEP"  # this stage's optimizer update; the index counts updates

    EXPECT_ACTIVATION = "EA"  # post the receive
    RECV_ACTIVATION = "RA"  # wait for it
    SEND_ACTIVATION = "SA"  # start the send; the send before it on this link must be done
    EXPECT_GRADIENT = "EG"
    RECV_GRADIENT = "RG"
    SEND_GRADIENT = "SG"

    SUM = "SUM"  # post the sum, over all copies of a tied weight, of their gradients of one update

    @property
    def is_compute(self) -> bool:
        """True for F, B, W and STEP; False for messages and sums."""
        return self in _COMPUTE


_COMPUTE = frozenset({OpKind.FORWARD, OpKind.BACKWARD, OpKind.WEIGHT, OpKind.STEP})
_PATTERN = re.compile(r"([A-Z]+)(\d+)(?:\.(\d+))?")


class Op(NamedTuple):
    """One op of one stage.

    Attributes:
        kind: what is done.
        index: the micro-batch, counted from 0 since the pipe was last empty; for STEP and SUM, the update.
        chunk: the model chunk of the stage, for schedules with several (interleaved, V); for SUM, the number of the
            tied weight, where there are several.
    """

    kind: OpKind
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]: it hides tuple.index, which nobody calls
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}{self.index}" + (f".{self.chunk}" if self.chunk else "")

    @classmethod
    def parse(cls, text: str) -> Op:
        """The op that is printed as `text`.  Raises ScheduleError if no op prints like this."""
        match = _PATTERN.fullmatch(text)
        try:
            kind, index, chunk = match.groups(default="0") if match else ("", "", "")
            return cls(OpKind(kind), int(index), int(chunk))
        except ValueError:
            kinds = ", ".join(kind.value for kind in OpKind)
            raise ScheduleError(
                f"{text!r} is not an op: write a kind ({kinds}), an index and, for a model chunk, '.' and its number, "
                "for example F3, STEP0 or B2.1"
            ) from None

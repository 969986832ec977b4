"""A check that the programs of several stages never wait for one another in a circle.

The programs are run against each other on a transport that does only what every transport must do, and with operations
that wait for their stage's whole device, as on NCCL, where a posted receive, a started send and a posted sum are
running kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from paci_schedule.core import grid
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.errors import ScheduleError

__all__ = ["ALWAYS", "NEVER", "Synchronising", "check_rendezvous"]

_EXPECT, _RECEIVE, _SEND, _SUM, _COMPUTE = range(5)
_ROLES = {  # kind -> (direction of the link, stage offset of its sender, role)
    OpKind.EXPECT_ACTIVATION: ("activation", -1, _EXPECT),
    OpKind.RECV_ACTIVATION: ("activation", -1, _RECEIVE),
    OpKind.SEND_ACTIVATION: ("activation", 0, _SEND),
    OpKind.EXPECT_GRADIENT: ("gradient", +1, _EXPECT),
    OpKind.RECV_GRADIENT: ("gradient", +1, _RECEIVE),
    OpKind.SEND_GRADIENT: ("gradient", 0, _SEND),
}


@dataclass(frozen=True, kw_only=True)
class Synchronising:
    """Which operations wait until their stage's device has nothing left to do.

    Attributes:
        kinds: the kinds of ops that end only then.  A posting, a send or a sum among them waits for itself, too, as
            under launch blocking.
        between_calls: whether the training loop waits for the device after every call.
        stages: the stages where this is so; None for all.
    """

    kinds: frozenset[OpKind] = frozenset()
    between_calls: bool = False
    stages: frozenset[int] | None = None


NEVER = Synchronising()
ALWAYS = Synchronising(kinds=frozenset(OpKind), between_calls=True)
"""Every launch blocks (CUDA_LAUNCH_BLOCKING=1), and so does the training loop."""


def check_rendezvous(
    programs: Sequence[Sequence[Op]],
    gradients_on_wire: Sequence[int],
    synchronising: Synchronising = NEVER,
    ends: Sequence[Sequence[int]] = (),
) -> None:
    """Run the stages' programs against each other on a transport that does only what every transport must do.

    A send blocks until its receive is posted, or, on a link that may have g gradients on the wire, the receive g - 1
    before it; a wait blocks until the send has started.  What waits for a stage's device ends only when every receive
    that the stage has posted is matched by a send that has started, every send that it has started by a posted receive,
    and every sum that it has posted has been posted by all stages that hold a copy.  Programs that finish under these
    rules finish under all weaker ones (asynchronous sends, buffered links, fewer ops that wait for the device).

    Args:
        programs: what each stage does, in order.
        gradients_on_wire: for each stage, how many gradients it may have on the wire (`Schedule`).
        synchronising: what waits for the device.
        ends: for each stage, how many of its ops were done at the end of each call; for `between_calls`.

    Raises:
        ScheduleError: a deadlock, a message that nobody takes, a sum that not all post, or messages taken in another
            order than sent.
    """
    _Run(programs, gradients_on_wire, synchronising, ends).check()


class _Link:
    """One direction between two neighbours: how many receives were posted, sends started and messages taken."""

    def __init__(self, name: str, slack: int) -> None:
        self.name, self.slack = name, slack
        self.counts = [0, 0, 0]  # by role
        self.sent: list[int] = []  # micro-batches


class _Run:
    def __init__(
        self,
        programs: Sequence[Sequence[Op]],
        gradients_on_wire: Sequence[int],
        synchronising: Synchronising,
        ends: Sequence[Sequence[int]],
    ) -> None:
        self.programs, self.synchronising = programs, synchronising
        self.links: dict[tuple[str, int], _Link] = {}
        self.of_stage: list[list[tuple[_Link, bool]]] = [[] for _ in programs]  # with whether the stage is the sender
        for sender in range(len(programs)):
            for direction, receiver in (("activation", sender + 1), ("gradient", sender - 1)):
                slack = gradients_on_wire[sender] - 1 if direction == "gradient" else 0
                link = _Link(f"the {direction} link of stage {sender}", slack)
                self.links[direction, sender] = link
                self.of_stage[sender].append((link, True))
                if 0 <= receiver < len(programs):
                    self.of_stage[receiver].append((link, False))
        self.summed: defaultdict[int, dict[int, int]] = defaultdict(dict)  # tie -> stage that holds it -> sums posted
        for stage, program in enumerate(programs):
            for op in program:
                if op.kind is OpKind.SUM:
                    self.summed[op.chunk][stage] = 0
        self.position, self.begun = [0] * len(programs), [False] * len(programs)
        devices = range(len(programs)) if synchronising.stages is None else synchronising.stages
        self.waits = [synchronising.kinds if stage in devices else frozenset() for stage in range(len(programs))]
        quiet_at = synchronising.between_calls and ends
        self.stops = [set(ends[stage]) if quiet_at and stage in devices else set() for stage in range(len(programs))]

    def check(self) -> None:
        moving = True
        while moving:
            moving = False
            for stage in range(len(self.programs)):
                moving |= self._advance(stage)
        if any(at < len(program) for at, program in zip(self.position, self.programs, strict=True)):
            device = "" if self.synchronising == NEVER else ", or for its own device,"
            raise self._fault(f"deadlock: every stage waits for another one{device} at the marked op")
        for (direction, sender), link in self.links.items():
            if len(set(link.counts)) > 1:
                self._mark_left_over(direction, sender, link)
                expected, received, sent = link.counts
                raise self._fault(
                    f"{link.name} ends with {sent} sends, {expected} posted receives and {received} taken ones"
                )
        for tie, counts in self.summed.items():
            if len(set(counts.values())) > 1:
                listed = ", ".join(f"stage {stage} {count}" for stage, count in counts.items())
                raise self._fault(f"the sums of tied weight {tie} end with other numbers of postings: {listed}")

    def _advance(self, stage: int) -> bool:
        """Run a stage until it has to wait; returns whether it did anything."""
        program, waits, stops = self.programs[stage], self.waits[stage], self.stops[stage]
        at, begun, moved = self.position[stage], self.begun[stage], False
        while at < len(program):
            op = program[at]
            if not begun:
                if at in stops and not self._is_quiet(stage):
                    break
                self.position[stage] = at
                if not op.kind.is_compute and not self._begin(stage, op):
                    break
                begun = moved = True
            if op.kind in waits and not self._is_quiet(stage):
                break
            at, begun, moved = at + 1, False, True
        self.position[stage], self.begun[stage] = at, begun
        return moved

    def _begin(self, stage: int, op: Op) -> bool:
        """Post, send or take, if that can be."""
        if op.kind is OpKind.SUM:
            self.summed[op.chunk][stage] += 1
            return True
        direction, offset, role = _ROLES[op.kind]
        link = self.links.get((direction, stage + offset))
        if link is None:
            raise self._fault(f"stage {stage} has {op}, but there is no such link")
        number = link.counts[role]
        if role == _SEND:
            if number - link.slack >= link.counts[_EXPECT]:
                return False
            link.sent.append(op.index)
        elif role == _RECEIVE:
            if number >= link.counts[_EXPECT]:
                raise self._fault(f"stage {stage} waits at {op} for a receive that it has not posted")
            if number >= len(link.sent):
                return False
            if link.sent[number] != op.index:
                raise self._fault(f"stage {stage} takes {op} where {link.sent[number]} was sent")
        link.counts[role] += 1
        return True

    def _is_quiet(self, stage: int) -> bool:
        """Whether the stage's device has nothing left to do."""
        for link, sends in self.of_stage[stage]:
            expected, _, sent = link.counts
            if sent > expected if sends else expected > sent:
                return False
        return all(stage not in counts or counts[stage] <= min(counts.values()) for counts in self.summed.values())

    def _mark_left_over(self, direction: str, sender: int, link: _Link) -> None:
        """Mark the first op of the link that has no counterpart."""
        role = max(range(3), key=lambda role: link.counts[role])
        where = [
            (stage, at)
            for stage, program in enumerate(self.programs)
            for at, op in enumerate(program)
            if op.kind in _ROLES and (direction, sender - stage, role) == _ROLES[op.kind]
        ]
        stage, at = where[min(link.counts)]
        self.position[stage] = at

    def _fault(self, rule: str) -> ScheduleError:
        return ScheduleError(f"{rule}\n{grid.marked(dict(enumerate(self.programs)), dict(enumerate(self.position)))}")

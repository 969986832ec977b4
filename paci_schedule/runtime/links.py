"""The links of a stage: activations down, gradients up, each direction with a process group of its own.

Two groups for each pair of neighbours, so that neither direction queues behind the other (operations of one
communicator run in order).  Receives are posted when the schedule says so, sends are asynchronous and hold their
buffers until they are done; what a stage may have on the wire is bounded.  A rank sets up its communicators with its
even pair of stages first, then with its odd one, so no stage waits for more than one other before its turn.

A message's buffer is held until the wait for it: on NCCL that wait comes before whatever the stream does next with the
memory, so no transfer reads or writes what another tensor has got.  torch records NCCL's stream on it besides, so freed
buffers return only as the device gets to them, and memory holds the messages by which the host has run ahead: a launch
queue's worth.  A ring of buffers would not change that, and would copy what is now a view.

A third link for each pair, on the host, carries one announcement a batch from the first stage downwards.  So a stage
learns that the data has ended before it waits for activations that will never come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from paci_schedule.core.ops import Op
from paci_schedule.errors import ConfigError
from paci_schedule.runtime.communicators import backend_for, connect
from paci_schedule.runtime.lookout import Lookout
from paci_schedule.runtime.message import HEADER, Layout, Payload, Riders
from paci_schedule.runtime.waiting import begun, waiting

__all__ = ["Links"]

_HOST = torch.device("cpu")
_ACTIVATION, _GRADIENT, _ANNOUNCEMENT = "activation", "gradient", "announcement"


@dataclass(frozen=True)
class _End:
    """One end of a one-way link.

    Attributes:
        group: the process group of this direction, of two ranks.
        peer: global rank at the other end.
        stage: this end's stage.
        peer_stage: the other end's stage.
        content: what travels: "activation", "gradient" or "announcement".
        device: where the messages live.
        timeout: how long the other end may take.
        lookout: what reports that a message does not come, where waiting for it returns at once; None for nothing.
    """

    group: dist.ProcessGroup
    peer: int
    stage: int
    peer_stage: int
    content: str
    device: torch.device
    timeout: timedelta
    lookout: Lookout | None

    def during(self, doing: str) -> AbstractContextManager[None]:
        """Name who waited for what."""
        return waiting(self.stage, doing, f"stage {self.peer_stage}", [self.peer], self.timeout)

    def note(self, op: Op) -> None:
        if self.lookout is not None:
            self.lookout.note(op)

    def wait(self, work: dist.Work, doing: str) -> None:
        """Wait for a message; on NCCL it is the current stream that does."""
        if self.lookout is not None:
            self.lookout.expect(doing, self.peer_stage, self.peer, work)
        with self.during(doing):
            work.wait()


class _Inbox:
    """The receiving end of a link; with `early`, receives are posted before their messages can be on the way."""

    def __init__(self, end: _End, early: bool = False) -> None:
        self._end, self._early = end, early
        self._layout: Layout | None = None
        self._header: tuple[dist.Work, torch.Tensor] | None = None
        self._expected = 0
        self._posted: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def warm_up(self) -> None:
        with self._end.during(f"set up the {self._end.content} link from"):
            dist.recv(torch.zeros(1, device=self._end.device), self._end.peer, group=self._end.group)

    def expect(self, op: Op) -> None:
        """Post the receive for the next message; before the layout is known, the one for the header that brings it.

        Where receives are posted early, what the first message is made of may need an op of this stage that comes after
        this one: waiting for the header is then left to `receive`.
        """
        self._end.note(op)
        self._expected += 1
        layout = self._layout
        if layout is None:
            if self._header is None:
                with self._end.during(f"posted the receive {op} of the shapes of the {self._end.content}s from"):
                    self._header = self._begin(torch.empty(HEADER, dtype=torch.uint8, device=self._end.device))
            if self._early:
                return
            layout = self._learn_layout(op)
        self._post(op, layout)

    def receive(self, op: Op) -> tuple[Payload, Riders]:
        """The oldest expected message, once it has arrived (on CUDA: for what the current stream does next)."""
        self._end.note(op)
        layout = self._layout
        if layout is None:
            layout = self._learn_layout(op)
            self._post(op, layout)
        work, buffer = self._posted.popleft()
        self._end.wait(work, f"waited ({op}) for the {self._end.content} of micro-batch {op.index} from")
        return layout.unpack(buffer)

    def _learn_layout(self, op: Op) -> Layout:
        assert self._header is not None, "`expect` has posted it"
        work, header = self._header
        doing = f"waited ({op}) for the shapes of the {self._end.content}s from"
        self._end.wait(work, doing)
        with self._end.during(doing):
            self._layout = layout = Layout.from_header(header)
        self._header = None
        return layout

    def _post(self, op: Op, layout: Layout) -> None:
        with self._end.during(f"posted the receive {op} of the {self._end.content} of micro-batch {op.index} from"):
            for _ in range(self._expected):
                self._posted.append(self._begin(layout.empty(self._end.device)))
        self._expected = 0

    def _begin(self, buffer: torch.Tensor) -> tuple[dist.Work, torch.Tensor]:
        return begun(dist.irecv(buffer, self._end.peer, group=self._end.group)), buffer

    def forget_layout(self) -> None:
        self._layout = None


class _Outbox:
    """The sending end of a link."""

    def __init__(self, end: _End, on_wire: int) -> None:
        self._end = end
        self.on_wire = on_wire
        self._layout: Layout | None = None
        self._header: tuple[dist.Work, torch.Tensor] | None = None
        self._sending: deque[tuple[dist.Work, torch.Tensor, str]] = deque()

    def warm_up(self) -> None:
        with self._end.during(f"set up the {self._end.content} link to"):
            dist.send(torch.zeros(1, device=self._end.device), self._end.peer, group=self._end.group)

    def send(self, op: Op, payload: Payload, riders: Riders = ()) -> None:
        """Start sending; first make sure that no more than `on_wire` messages are under way."""
        self._end.note(op)
        layout = Layout.of(payload, riders)
        doing = f"sent ({op}) the {self._end.content} of micro-batch {op.index} to"
        with self._end.during(doing):
            if self._layout is None:
                header = layout.header(self._end.device)
                self._header = self._begin(header)
                self._layout = layout
            elif layout != self._layout:
                raise ConfigError(
                    f"micro-batch {op.index} makes stage {self._end.stage} send {layout} where the micro-batches "
                    f"before it made it send {self._layout}: all micro-batches must have the same shapes; drop or pad "
                    "the odd one (drop_last=True), or call engine.reset_activation_shape() on every rank when the "
                    "shape changes"
                )
            self._settle(self.on_wire - 1)
            self._sending.append((*self._begin(layout.pack(payload, riders)), doing))

    def finish(self) -> None:
        """Wait until every message has left."""
        self._settle(0)

    def forget_layout(self) -> None:
        self._layout = None

    def _begin(self, buffer: torch.Tensor) -> tuple[dist.Work, torch.Tensor]:
        return begun(dist.isend(buffer, self._end.peer, group=self._end.group)), buffer

    def _settle(self, remaining: int) -> None:
        while len(self._sending) > remaining:
            work, _, doing = self._sending.popleft()
            if self._header is not None:  # it left before them
                self._end.wait(self._header[0], doing)
                self._header = None
            self._end.wait(work, doing)


class Links:
    """All links of one stage of one pipeline.

    Every rank of the job constructs its own at the same time; construction sets up the communicators.

    Args:
        pipelines: for every pipeline of the job, the global rank of each stage, in stage order; the same on every rank.
        device: where activations and gradients live.
        timeout: how long a neighbour may take to answer.
        early_receives: whether the receives of gradients are posted before F (`core.lower`).
        record: folder in which the lookout also writes which stage this one has waited for in vain; None for the log
            only.
        looks_out: whether a lookout reports messages that do not come, since waiting for one returns at once; None for
            yes if the transport is NCCL.

    Raises:
        LinkError: a neighbour did not answer; also from every method.
    """

    def __init__(
        self,
        pipelines: Sequence[Sequence[int]],
        device: torch.device,
        timeout: timedelta,
        *,
        early_receives: bool = False,
        record: str | None = None,
        looks_out: bool | None = None,
    ) -> None:
        # By what they carry.  A stage at an end of the pipeline has none beyond it, and no op that needs one.
        self._inboxes: dict[str, _Inbox] = {}
        self._outboxes: dict[str, _Outbox] = {}
        rank = dist.get_rank()
        stage = next(ranks.index(rank) for ranks in pipelines if rank in ranks)
        pairs = connect(pipelines, device, timeout)
        self._timeout = timeout
        self._pipeline = None
        if looks_out is None:
            looks_out = bool(pairs) and backend_for(device) == "nccl"
        self._lookout = Lookout(stage, device, timeout, record) if pairs and looks_out else None
        order: list[_Inbox | _Outbox] = []
        for pair in pairs:
            above = rank == pair.ranks[0]
            end = partial(
                _End,
                peer=pair.ranks[above],
                stage=stage,
                peer_stage=stage + 1 if above else stage - 1,
                timeout=timeout,
            )
            down = end(group=pair.down, content=_ACTIVATION, device=device, lookout=self._lookout)
            up = end(group=pair.up, content=_GRADIENT, device=device, lookout=self._lookout)
            self._pipeline = next(ranks for ranks in pipelines if rank in ranks), pair.announcements
            announcements = end(group=pair.announcements, content=_ANNOUNCEMENT, device=_HOST, lookout=None)
            if above:
                self._outboxes[_ACTIVATION] = activations = _Outbox(down, 1)
                self._inboxes[_GRADIENT] = gradients = _Inbox(up, early_receives)
                self._outboxes[_ANNOUNCEMENT] = announced = _Outbox(announcements, 1)
            else:
                self._inboxes[_ACTIVATION] = activations = _Inbox(down)
                self._outboxes[_GRADIENT] = gradients = _Outbox(up, 1)
                self._inboxes[_ANNOUNCEMENT] = announced = _Inbox(announcements)
            order += [activations, gradients, announced]
        for box in order:
            box.warm_up()

    def limit_gradients(self, on_wire: int) -> None:
        """Let at most so many gradients be on the way to the stage before this one, where the pipe is empty; else 1."""
        if _GRADIENT in self._outboxes:
            self._outboxes[_GRADIENT].on_wire = on_wire

    def expect_activation(self, op: Op) -> None:
        self._inboxes[_ACTIVATION].expect(op)

    def recv_activation(self, op: Op) -> tuple[Payload, Riders]:
        return self._inboxes[_ACTIVATION].receive(op)

    def send_activation(self, op: Op, payload: Payload, riders: Riders) -> None:
        self._outboxes[_ACTIVATION].send(op, payload, riders)

    def expect_gradient(self, op: Op) -> None:
        self._inboxes[_GRADIENT].expect(op)

    def recv_gradient(self, op: Op) -> tuple[Payload, Riders]:
        return self._inboxes[_GRADIENT].receive(op)

    def send_gradient(self, op: Op, payload: Payload, riders: Riders) -> None:
        self._outboxes[_GRADIENT].send(op, payload, riders)

    def announce(self, next_op: Op, whole_batch: Callable[[], bool]) -> bool:
        """Whether the batch that begins with `next_op` is whole: the first stage asks and tells the next one."""
        before, after = self._inboxes.get(_ANNOUNCEMENT), self._outboxes.get(_ANNOUNCEMENT)
        if before is None:
            is_whole = torch.tensor([whole_batch()])
        else:
            before.expect(next_op)
            is_whole, _ = before.receive(next_op)
        if after is not None:
            after.send(next_op, is_whole)
        return bool(is_whole)

    def tell_from_last(self, values: torch.Tensor) -> None:
        """Put what the last stage of the pipeline has in `values`, on the host, into every stage's, and wait for it."""
        if self._pipeline is None:
            return
        ranks, group = self._pipeline
        last = f"stage {len(ranks) - 1}"
        with waiting(
            ranks.index(dist.get_rank()), "shared the first batch's loss with", last, [ranks[-1]], self._timeout
        ):
            dist.broadcast(values, ranks[-1], group=group)

    def reset_shapes(self) -> None:
        """Forget the shapes of the messages; the next ones bring theirs.  The pipe must be empty, on every rank."""
        for box in (*self._inboxes.values(), *self._outboxes.values()):
            box.forget_layout()

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        for box in self._outboxes.values():
            box.finish()

"""The links of a stage: activations down, gradients up, each direction with a process group of its own.

Two groups for each pair of neighbours, so that neither direction queues behind the other (operations of one
communicator run in order).  Receives are posted when the schedule says so, sends are asynchronous and hold their
buffers until they are done; what a stage may have on the wire is bounded.  A rank sets up its communicators with its
even pair of stages first, then with its odd one, so no stage waits for more than one other before its turn.

A message's buffer is held until the wait for it: on NCCL that wait comes before whatever the stream does next with the
memory, so no transfer reads or writes what another tensor has got.  torch records NCCL's stream on it besides, so freed
buffers return only as the device gets to them, and memory holds the messages by which the host has run ahead: a launch
queue's worth.  A ring of buffers would not change that, and would copy what is now a view.

A third link for each pair, on the host, carries one announcement a batch from the first stage downwards.  It says
whether there is another batch, so that no stage waits for activations that will never come, and for each micro-batch
the number that stands for the shapes of its inputs (`shapes`).  A stage that has sent or received a message of a
micro-batch with the same number knows the layout of the next one and posts its receive at once.  The first one brings
its layout in a header, which also goes from host to host: no device is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.errors import LinkError
from paci_schedule.runtime.boxes import End, Inbox, Outbox
from paci_schedule.runtime.communicators import backend_for, connect
from paci_schedule.runtime.lookout import Lookout
from paci_schedule.runtime.message import Payload, Riders
from paci_schedule.runtime.waiting import begun

__all__ = ["Links"]

_ACTIVATION, _GRADIENT = "activation", "gradient"
_LOSS = 1  # the tag of the first batch's loss; announcements and headers have 0
_ENDED = -1  # the first number of an announcement that there is no other batch


class Links:
    """All links of one stage of one pipeline.

    Every rank of the job constructs its own at the same time; construction sets up the communicators.

    Args:
        pipelines: for every pipeline of the job, the global rank of each stage, in stage order; the same on every rank.
        device: where activations and gradients live.
        timeout: how long a neighbour may take to answer.
        early_receives: whether the receives of gradients are posted before F (`core.lower`).
        varying_shapes: whether shapes may change from micro-batch to micro-batch without being announced: every message
            then has a header, for which the host waits.
        lost: told by the lookout that this stage has waited in vain; None for nobody.
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
        varying_shapes: bool = False,
        lost: Callable[[LinkError], None] | None = None,
        looks_out: bool | None = None,
    ) -> None:
        # By what they carry.  A stage at an end of the pipeline has none beyond it, and no op that needs one.
        self._inboxes: dict[str, Inbox] = {}
        self._outboxes: dict[str, Outbox] = {}
        self._above: End | None = None
        self._below: End | None = None
        self._announced: tuple[dist.Work, torch.Tensor] | None = None
        self._shapes: dict[int, int] = {}  # of the micro-batches of which there are messages to come
        self._lowest, self._varying = 0, varying_shapes
        rank = dist.get_rank()
        stage = next(ranks.index(rank) for ranks in pipelines if rank in ranks)
        pairs = connect(pipelines, device, timeout)
        if looks_out is None:
            looks_out = bool(pairs) and backend_for(device) == "nccl"
        self._lookout = Lookout(stage, device, timeout, lost) if pairs and looks_out else None
        order: list[Inbox | Outbox] = []
        for pair in pairs:
            above = rank == pair.ranks[0]
            end = partial(
                End,
                host=pair.announcements,
                peer=pair.ranks[above],
                stage=stage,
                peer_stage=stage + 1 if above else stage - 1,
                device=device,
                timeout=timeout,
                lookout=self._lookout,
            )
            down, up = end(group=pair.down, content=_ACTIVATION), end(group=pair.up, content=_GRADIENT)
            if above:
                self._below = down
                self._outboxes[_ACTIVATION] = activations = Outbox(down, 1)
                self._inboxes[_GRADIENT] = gradients = Inbox(up, early_receives)
            else:
                self._above = down
                self._inboxes[_ACTIVATION] = activations = Inbox(down)
                self._outboxes[_GRADIENT] = gradients = Outbox(up, 1)
            order += [activations, gradients]
        for box in order:
            box.warm_up()

    def limit_gradients(self, on_wire: int) -> None:
        """Let at most so many gradients be on the way to the stage before this one, where the pipe is empty; else 1."""
        if _GRADIENT in self._outboxes:
            self._outboxes[_GRADIENT].on_wire = on_wire

    def expect_activation(self, op: Op) -> None:
        self._inboxes[_ACTIVATION].expect(op, self._shapes_of(op))

    def recv_activation(self, op: Op) -> tuple[Payload, Riders]:
        return self._inboxes[_ACTIVATION].receive(op)

    def send_activation(self, op: Op, payload: Payload, riders: Riders) -> None:
        self._outboxes[_ACTIVATION].send(op, self._shapes_of(op), payload, riders)

    def expect_gradient(self, op: Op) -> None:
        self._inboxes[_GRADIENT].expect(op, self._shapes_of(op))

    def recv_gradient(self, op: Op) -> tuple[Payload, Riders]:
        if self._above is None:  # no other message of the micro-batch is to come
            self._shapes.pop(op.index, None)
        return self._inboxes[_GRADIENT].receive(op)

    def send_gradient(self, op: Op, payload: Payload, riders: Riders) -> None:
        self._outboxes[_GRADIENT].send(op, self._shapes_of(op, last=True), payload, riders)

    def announce(self, next_op: Op, micro_batches: int, read: Callable[[], Sequence[int] | None]) -> bool:
        """Learn whether there is another batch, and of which shapes; the first stage finds out and tells the others.

        Args:
            next_op: the forward of the batch's first micro-batch.
            micro_batches: of the batch.
            read: asked at the first stage: the lowest number of shapes that is still in use, and the number of each
                micro-batch; None where there is no whole batch.  The lowest number may change only while the pipe is
                empty.

        Returns:
            Whether there is.
        """
        above, below = self._above, self._below
        if above is None:
            numbers = read()
            message = torch.tensor([_ENDED] * (1 + micro_batches) if numbers is None else numbers)
        else:
            message = torch.empty(1 + micro_batches, dtype=torch.int64)
            with above.during(f"waited ({next_op}) for the announcement of micro-batch {next_op.index} from"):
                dist.recv(message, above.peer, group=above.host)
        if below is not None:
            with below.during(f"announced micro-batch {next_op.index} to"):
                if self._announced is not None:
                    self._announced[0].wait()
                self._announced = begun(dist.isend(message, below.peer, group=below.host)), message
        lowest, *shapes = message.tolist()
        if lowest == _ENDED:
            return False
        if self._inboxes:
            self._shapes.update(enumerate(shapes, next_op.index))
        if lowest != self._lowest:
            self._lowest = lowest
            for box in (*self._inboxes.values(), *self._outboxes.values()):
                box.forget(lowest)
        return True

    def tell_from_last(self, first_op: Op, values: torch.Tensor) -> None:
        """Put what the last stage has in `values`, on the host, into every stage's; each hears it from the next one.

        Args:
            first_op: the forward of the batch's first micro-batch, for the error if nothing comes.
            values: fp32[n], on the host.
        """
        if self._below is not None:
            with self._below.during(f"waited for the loss of the batch that begins with {first_op} from"):
                dist.recv(values, self._below.peer, group=self._below.host, tag=_LOSS)
        if self._above is not None:
            with self._above.during(f"passed the loss of the batch that begins with {first_op} to"):
                dist.send(values, self._above.peer, group=self._above.host, tag=_LOSS)

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        if self._announced is not None and self._below is not None:
            with self._below.during("announced a batch to"):
                self._announced[0].wait()
            self._announced = None
        for box in self._outboxes.values():
            box.finish()

    def under_way(self) -> list[str]:
        """The messages that are posted or sent and not done, for people."""
        return [line for box in (*self._inboxes.values(), *self._outboxes.values()) for line in box.under_way()]

    def awaited(self, op: Op) -> tuple[int, ...]:
        """The rank that this stage may stand and wait for in an op; none where the op has no message."""
        above = (OpKind.EXPECT_ACTIVATION, OpKind.RECV_ACTIVATION, OpKind.SEND_GRADIENT)
        below = (OpKind.EXPECT_GRADIENT, OpKind.RECV_GRADIENT, OpKind.SEND_ACTIVATION)
        end = self._above if op.kind in above else self._below if op.kind in below else None
        return () if end is None else (end.peer,)

    def _shapes_of(self, op: Op, *, last: bool = False) -> int | None:
        """The number of the shapes of a micro-batch; 0 where none was announced, None where they vary.

        Args:
            op: one that its message needs.
            last: whether this stage has no other message of the micro-batch to come.
        """
        if self._varying:
            return None
        return (self._shapes.pop if last else self._shapes.get)(op.index, 0)

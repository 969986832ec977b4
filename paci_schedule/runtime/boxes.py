"""The two ends of a one-way link between neighbouring stages, which send and receive messages."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from paci_schedule.core.ops import Op
from paci_schedule.errors import ConfigError
from paci_schedule.runtime.lookout import Lookout
from paci_schedule.runtime.message import HEADER, Layout, Payload, Riders
from paci_schedule.runtime.waiting import begun, waiting

__all__ = ["End", "Inbox", "Outbox"]


@dataclass(frozen=True)
class End:
    """One end of a one-way link.

    Attributes:
        group: the process group of this direction, of two ranks.
        host: a group of hosts that both ranks are in, for headers.
        peer: global rank at the other end.
        stage: this end's stage.
        peer_stage: the other end's stage.
        content: what travels: "activation" or "gradient".
        device: where the messages live.
        timeout: how long the other end may take.
        lookout: what reports that a message does not come, where waiting for it returns at once; None for nothing.
    """

    group: dist.ProcessGroup
    host: dist.ProcessGroup
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


class _Box:
    """An end of a link, and the layouts that it knows, by the numbers that stand for shapes (`runtime.shapes`)."""

    def __init__(self, end: End) -> None:
        self._end = end
        self._layouts: dict[int, Layout] = {}

    def forget(self, before: int) -> None:
        """Drop the layouts of all shapes with a number below this one."""
        self._layouts = {number: layout for number, layout in self._layouts.items() if number >= before}


class Inbox(_Box):
    """The receiving end of a link; with `early`, receives are posted before their messages can be on the way."""

    def __init__(self, end: End, early: bool = False) -> None:
        super().__init__(end)
        self._early = early
        self._expected: deque[tuple[Op, int | None]] = deque()  # not posted yet
        self._posted: deque[tuple[dist.Work, torch.Tensor, Layout, Op]] = deque()

    def warm_up(self) -> None:
        with self._end.during(f"set up the {self._end.content} link from"):
            dist.recv(torch.zeros(1, device=self._end.device), self._end.peer, group=self._end.group)

    def expect(self, op: Op, shapes: int | None) -> None:
        """Post the receive for the next message; where its layout is not known, wait for the header that brings it.

        Where receives are posted early, what the message is made of may need an op of this stage that comes after this
        one: waiting for the header is then left to `receive`.

        Args:
            op: what this is for.
            shapes: the number that stands for the shapes of the micro-batch; None where every message has a header.
        """
        self._end.note(op)
        self._expected.append((op, shapes))
        self._post(waits=not self._early)

    def receive(self, op: Op) -> tuple[Payload, Riders]:
        """The oldest expected message, once it has arrived (on CUDA: for what the current stream does next)."""
        self._end.note(op)
        if not self._posted:
            self._post_next(self._learn(op))
            self._post(waits=False)
        work, buffer, layout, _ = self._posted[0]
        self._end.wait(work, f"waited ({op}) for the {self._end.content} of micro-batch {op.index} from")
        self._posted.popleft()
        return layout.unpack(buffer)

    def under_way(self) -> list[str]:
        """What has been posted, or is to be, and has not been used."""
        ops = [op for *_, op in self._posted] + [op for op, _ in self._expected]
        return [f"{op}: the {self._end.content} of micro-batch {op.index} from rank {self._end.peer}" for op in ops]

    def _post(self, waits: bool) -> None:
        """Post the receives of what is expected, in order, up to a message that only its header can describe."""
        while self._expected:
            op, shapes = self._expected[0]
            layout = None if shapes is None else self._layouts.get(shapes)
            if layout is None:
                if not waits:
                    return
                layout = self._learn(op)
            self._post_next(layout)

    def _learn(self, op: Op) -> Layout:
        """Wait for the header of the next expected message."""
        end, (_, shapes) = self._end, self._expected[0]
        header = torch.empty(HEADER, dtype=torch.uint8)
        with end.during(f"waited ({op}) for the shapes of the {end.content}s from"):
            dist.recv(header, end.peer, group=end.host)
        layout = Layout.from_header(header)
        if shapes is not None:
            self._layouts[shapes] = layout
        return layout

    def _post_next(self, layout: Layout) -> None:
        end, (op, _) = self._end, self._expected.popleft()
        buffer = layout.empty(end.device)
        with end.during(f"posted the receive {op} of the {end.content} of micro-batch {op.index} from"):
            work = begun(dist.irecv(buffer, end.peer, group=end.group))
        self._posted.append((work, buffer, layout, op))


class Outbox(_Box):
    """The sending end of a link."""

    def __init__(self, end: End, on_wire: int) -> None:
        super().__init__(end)
        self.on_wire = on_wire
        self._sending: deque[tuple[dist.Work, tuple[torch.Tensor, ...], dist.Work | None, str]] = deque()

    def warm_up(self) -> None:
        with self._end.during(f"set up the {self._end.content} link to"):
            dist.send(torch.zeros(1, device=self._end.device), self._end.peer, group=self._end.group)

    def send(self, op: Op, shapes: int | None, payload: Payload, riders: Riders = ()) -> None:
        """Start sending; first make sure that no more than `on_wire` messages are under way.

        Args:
            op: what this is for.
            shapes: as of `Inbox.expect`.
            payload, riders: the message.

        Raises:
            ConfigError: a micro-batch with the same number made this stage send other shapes.
        """
        end, layout, header = self._end, Layout.of(payload, riders), None
        end.note(op)
        known = None if shapes is None else self._layouts.get(shapes)
        doing = f"sent ({op}) the {end.content} of micro-batch {op.index} to"
        buffers: tuple[torch.Tensor, ...] = ()
        with end.during(doing):
            if known is None:
                buffers = (layout.header(),)
                header = begun(dist.isend(*buffers, end.peer, group=end.host))
                if shapes is not None:
                    self._layouts[shapes] = layout
            elif layout != known:
                raise ConfigError(
                    f"micro-batch {op.index} makes stage {end.stage} send {layout}, where one whose inputs have the "
                    f"same shapes made it send {known}: what a stage sends must follow from the shapes of the inputs, "
                    "so pad it.  On DeepSpeed, where it changes with something else than the inputs, call "
                    "engine.drain() and engine.reset_activation_shape() on every rank before the change; on Megatron, "
                    "where nothing is known of the inputs, say --variable-seq-lengths"
                )
            self._settle(self.on_wire - 1)
            buffer = layout.pack(payload, riders)
            work = begun(dist.isend(buffer, end.peer, group=end.group))
        self._sending.append((work, (*buffers, buffer), header, doing))

    def finish(self) -> None:
        """Wait until every message has left."""
        self._settle(0)

    def under_way(self) -> list[str]:
        """What has been sent, and has not been waited for."""
        return [f"{doing} rank {self._end.peer}" for *_, doing in self._sending]

    def _settle(self, remaining: int) -> None:
        while len(self._sending) > remaining:
            work, _, header, doing = self._sending[0]
            if header is not None:  # it left before the message
                with self._end.during(doing):
                    header.wait()
            self._end.wait(work, doing)
            self._sending.popleft()

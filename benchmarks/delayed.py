"""A torch.distributed backend on gloo whose point-to-point messages arrive a fixed time late: slow links, made here."""

from __future__ import annotations

import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist

from paci_schedule.runtime.shared_gpu import SharedGpuGroup

__all__ = ["use_delayed_links"]


class _Late(dist.Work):
    def __init__(self, done: Future[None]) -> None:
        super().__init__()
        self._done = done

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._done.result(timeout.total_seconds() or None)
        return True

    def is_completed(self) -> bool:
        return self._done.done()


_POSTED = 1 << 10  # added to a message's tag: of the word that its receive is posted


def use_delayed_links(latency: float, rendezvous: bool = False) -> None:
    """Make every process group from here on one whose messages take `latency` seconds longer, in order.

    Args:
        latency: seconds.
        rendezvous: they count from where the message is sent and its receive posted, as on NCCL, not from the send.
    """

    class DelayedGroup(SharedGpuGroup):
        def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
            super().__init__(store, rank, size, timeout)
            self._wires: dict[int, ThreadPoolExecutor] = {}
            self._words: deque[dist.Work] = deque(maxlen=64)  # a buffer lives as long as its handle

        def send(self, tensors: list[torch.Tensor], destination: int, tag: int) -> dist.Work:
            due, message = time.monotonic() + latency, [tensors[0].clone()]

            def arrive() -> None:
                if rendezvous:
                    self._gloo.recv([torch.empty(1)], destination, tag + _POSTED).wait()
                    time.sleep(latency)
                time.sleep(max(0.0, due - time.monotonic()))
                super(DelayedGroup, self).send(message, destination, tag).wait()

            wire = self._wires.setdefault(destination, ThreadPoolExecutor(max_workers=1))
            return _Late(wire.submit(arrive))

        def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> dist.Work:
            if rendezvous:
                self._words.append(self._gloo.send([torch.zeros(1)], source, tag + _POSTED))
            return super().recv(tensors, source, tag)

    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.Backend.register_backend("delayed", DelayedGroup, devices=["cpu"])
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), world, is_master=False)
    dist.init_process_group("delayed", store=dist.PrefixStore("delayed", store), rank=rank, world_size=world)

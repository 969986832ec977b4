"""A torch.distributed backend with the habits of NCCL's, on gloo and the CPU, that reports a race instead of losing it.

Its habits are those of PyTorch's ProcessGroupNCCL (torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp):

* a collective runs on the current stream and returns None, unless `options.asyncOp` is set;
* `wait()` returns at once: the stream will wait, the host does not.  With a timeout the host waits until the operation
  is done, and so it does for a barrier;
* an operation begins when the stream has come to where it was posted, and operations of one communicator run in order,
  messages among them (as where `init_process_group` was given a device);
* a message is read from, and written to, its buffer at any time until it is done.  Here it comes a random while late,
  and what is to be written holds 0xFF in every byte from the posting on.

Messages that are grouped (`batch_isend_irecv`), which NCCL starts together, are not played: of what is tested, only
Megatron's own schedule groups them.

`testing.played_stream` plays the stream, and raises where something touches a buffer too early.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from testing.played_stream import PATIENCE, Device, Operation, tensors_in

__all__ = ["BACKEND", "install", "synchronize"]

BACKEND = "nccl_like"

_LATEST = 0.002  # seconds that a message or a collective takes at most longer than gloo, before and after it

# Name -> which arguments are written, and which are read.
_COLLECTIVES = {
    **dict.fromkeys(("allreduce", "allreduce_coalesced", "broadcast", "reduce"), ((0,), (0,))),
    **dict.fromkeys(
        (
            "_allgather_base", "_reduce_scatter_base", "all_gather_single", "all_gather_single_coalesced",
            "all_to_all_single", "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "alltoall",
            "alltoall_base", "gather", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced",
            "reduce_scatter_tensor_coalesced", "scatter",
        ),
        ((0,), (1,)),
    ),
}  # fmt: skip

_ROOTED = {"broadcast": False, "reduce": True}  # name -> whether it is the root, or everyone else, that it writes to


class NcclLikeGroup(dist.ProcessGroup):
    """One communicator."""

    def __init__(self, device: Device, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.device = device
        self._gloo = dist.ProcessGroup(store, rank, size)
        kind = dist.ProcessGroup.BackendType.GLOO
        backend = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._gloo._register_backend(torch.device("cpu"), kind, backend)
        self._gloo._set_default_backend(kind)
        self._gloo._set_group_name(f"gloo below {id(self)}")
        self._queue = ThreadPoolExecutor(max_workers=1)

    def getBackendName(self) -> str:
        return BACKEND

    def send(self, tensors: list[torch.Tensor], destination: int, tag: int) -> dist.Work:
        def move() -> None:
            self._gloo.send(tensors, destination, tag).wait()

        return self._post(f"send to rank {destination}", destination, tensors, [], move)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> dist.Work:
        arrived = torch.empty_like(tensors[0])

        def move() -> None:
            self._gloo.recv([arrived], source, tag).wait()

        return self._post(f"receive from rank {source}", source, [], tensors, move, [arrived])

    def barrier(self, opts: dist.BarrierOptions) -> dist.Work | None:
        barrier = self._post("barrier", None, [], [], lambda: self._gloo.barrier(opts).wait())
        return barrier if opts.asyncOp else barrier.wait() and None

    def _post(
        self, name: str, peer: int | None, reads: list[torch.Tensor], writes: list[torch.Tensor],
        move: Callable[[], None], results: Iterable[torch.Tensor] = (), asynchronous: bool = True,
    ) -> Operation:  # fmt: skip
        """Let the communicator `move`, and copy the `results` to what the operation writes."""
        device, late = self.device, self.device.random.uniform(0.0, _LATEST)
        for tensor in reads:
            device.touch(tensor, False, name, self)
        for tensor in writes:
            device.touch(tensor, True, name, self)
            with device.unseen():
                tensor.data.reshape(-1).view(torch.uint8).fill_(0xFF)

        def move_late() -> None:
            with torch.no_grad():
                time.sleep(late)
                move()
                time.sleep(late)
                for tensor, result in zip(writes, results, strict=True):
                    tensor.data.copy_(result)

        operation = Operation(name, self, peer, reads, writes)
        self._queue.submit(operation.run, device.post(operation, asynchronous), move_late)
        return operation


def _collective(name: str) -> Callable[..., dist.Work | None]:
    written, read = _COLLECTIVES[name]

    def collective(self: NcclLikeGroup, *args: Any) -> dist.Work | None:
        options = args[-1]
        reads, writes = (list(tensors_in([args[number] for number in numbers])) for numbers in (read, written))
        for tensor in reads:
            self.device.touch(tensor, False, name, self)
        with self.device.unseen():
            copies = {id(tensor): tensor.detach().clone() for tensor in (*reads, *writes)}
        if name in _ROOTED and (options.rootRank == self.rank()) != _ROOTED[name]:
            writes = []
        operation = self._post(
            name, None, [tensor for tensor in reads if not _among(tensor, writes)], writes,
            lambda: getattr(self._gloo, name)(*_replaced(args, copies)).wait(),
            [copies[id(tensor)] for tensor in writes], options.asyncOp,
        )  # fmt: skip
        return operation if options.asyncOp else None

    return collective


for _name in _COLLECTIVES:
    setattr(NcclLikeGroup, _name, _collective(_name))


def install(rank: int) -> None:
    """Register the backend in this process and let its stream see every op of this thread from here on."""
    device = Device(rank)
    dist.Backend.register_backend(BACKEND, functools.partial(NcclLikeGroup, device), devices=["cpu"])
    device.watch()


def synchronize(timeout: float = PATIENCE) -> None:
    """Do what `torch.cuda.synchronize` does, for a rank whose default group is of this backend.

    Raises:
        StuckError: something that was posted is not done within `timeout` seconds; on a GPU this would hang.
    """
    dist.group.WORLD.device.synchronize(timeout)


def _replaced(value: Any, copies: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(each, copies) for each in value)
    return copies.get(id(value), value)


def _among(tensor: torch.Tensor, others: list[torch.Tensor]) -> bool:
    return any(tensor is other for other in others)

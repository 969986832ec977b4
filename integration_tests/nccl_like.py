"""A torch.distributed backend with the habits of NCCL's, on gloo and the CPU, that reports a race instead of losing it.

Its habits are those of PyTorch's ProcessGroupNCCL (torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp):

* a collective runs on the current stream and returns None, unless `options.asyncOp` is set;
* `wait()` returns at once: the stream will wait, the host does not.  With a timeout the host waits until the operation
  is done, and so it does for a barrier;
* an operation begins when the stream has come to where it was posted, and operations of one communicator run in order,
  messages among them (as where `init_process_group` was given a device);
* a message is read from, and written to, its buffer at any time until it is done.  Here it comes a random while late,
  and what is to be written holds 0xFF in every byte from the posting on.

Computation on the CPU is synchronous, so a TorchDispatchMode plays the stream.  An op on what is being received blocks
until it is there, if someone has waited for it, as the stream would; if nobody has, it raises `RaceError`, however late
the message is.  So does one that writes to what is being sent.  `numpy` and `tolist`, which no mode sees, are
looked at as well; code that reads a tensor's memory by its address is not.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["BACKEND", "RaceError", "StuckError", "install", "synchronize"]

BACKEND = "nccl_like"

_LATEST = 0.002  # seconds that a message or a collective takes at most longer than gloo
_PATIENCE = 100.0  # seconds that the stream waits for one operation

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

# Ops that take a tensor for its shape only; views are told by their schemas.
_SHAPE_ONLY = ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_empty_strided", "new_zeros",
               "new_ones", "new_full", "rand_like", "randn_like")  # fmt: skip


class RaceError(Exception):
    """Something touched a buffer that an operation nobody has waited for reads or writes."""


class StuckError(Exception):
    """An operation that the device waits for is not done in time."""


class _Operation(dist.Work):
    """A message or a collective.

    Args:
        name: for errors.
        group: the communicator.
        peer: of a message, which PyTorch may give a stream of its own.
        reads, writes: the buffers, which it keeps.

    Attributes:
        ordered: the stream waits for it, so what comes later in the stream may touch its buffers.
    """

    def __init__(
        self, name: str, group: NcclLikeGroup, peer: int | None, reads: list[torch.Tensor], writes: list[torch.Tensor]
    ) -> None:
        super().__init__()
        self.name, self.group, self.peer = name, group, peer
        self.read, self.written = list(map(_span, reads)), list(map(_span, writes))
        self.ordered = False
        self._kept = reads, writes
        self._done = threading.Event()
        self._error: BaseException | None = None

    def run(self, after: Iterable[_Operation], move: Callable[[], None]) -> None:
        """In the communicator's thread: once the stream is there, do it."""
        try:
            for operation in after:
                operation._done.wait()
            move()
        except BaseException as error:  # whoever needs the data shall see it
            self._error = error
        self._done.set()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self.group.device.order(self)
        if timeout:
            self.finish(timeout.total_seconds(), dist.DistBackendError)
        elif self.name == "barrier":
            self.group.device.reach()
        return True

    def is_completed(self) -> bool:
        return self._done.is_set()

    def finish(self, patience: float = _PATIENCE, late: type[Exception] = StuckError) -> None:
        """Block until it is done.  Raises what it failed with, or `late`."""
        if not self._done.wait(patience):
            raise late(f"{self} timed out after {patience:g} s")
        if self._error is not None:
            raise self._error

    def __str__(self) -> str:
        return f"{self.name} of {self.group.group_desc or 'a group'} ({self.group.size()} ranks)"


class _Device:
    """What one rank has posted and nothing has made sure of yet, in order."""

    def __init__(self, rank: int) -> None:
        self.random = random.Random(rank)
        self.posted: list[_Operation] = []
        self.sees = True  # what this process computes is what the stream does

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Within it, what is computed is this backend's own work."""
        self.sees = False
        try:
            yield
        finally:
            self.sees = True

    def post(self, operation: _Operation, asynchronous: bool) -> list[_Operation]:
        """The operation stands in the stream.  Returns what comes before it there."""
        before = [other for other in self.posted if other.ordered and not other.is_completed()]
        operation.ordered = not asynchronous
        self.posted.append(operation)
        return before

    def order(self, operation: _Operation) -> None:
        """The stream waits for an operation, and so for what came before it in its communicator's stream."""
        if operation in self.posted:
            for other in self.posted[: self.posted.index(operation) + 1]:
                other.ordered |= (other.group, other.peer) == (operation.group, operation.peer)

    def touch(self, tensor: torch.Tensor, writes: bool, by: str, group: dist.ProcessGroup | None = None) -> None:
        """The stream reads or writes a tensor; for the same `group`, whose operations are in order anyway."""
        start, end = _span(tensor)
        for operation in tuple(self.posted):
            spans = operation.written + operation.read if writes else operation.written
            if not any(start < other_end and other_start < end for other_start, other_end in spans):
                continue
            if not operation.ordered and operation.group is not group:
                raise RaceError(
                    f"{by} {'writes' if writes else 'reads'} a buffer of {operation}, {list(tensor.shape)} "
                    f"{tensor.dtype}, which was never waited for: on a GPU it {'would' if writes else 'may'} "
                    f"{'change what travels' if writes else 'see anything'}; call wait() before"
                )
            operation.finish()
        self.posted = [other for other in self.posted if not (other.ordered and other.is_completed())]

    def reach(self) -> None:
        """Block until the stream has done everything that it waits for."""
        for operation in tuple(self.posted):
            if operation.ordered:
                operation.finish()

    def synchronize(self, timeout: float) -> None:
        """Block until everything posted is done, waited for or not."""
        deadline = time.monotonic() + timeout
        for operation in self.posted:
            if not operation._done.wait(max(0.0, deadline - time.monotonic())):
                left = [str(other) for other in self.posted if not other.is_completed()]
                raise StuckError(f"the device is not idle after {timeout:g} s: it still runs {', '.join(left)}")
            operation.finish()
        self.posted.clear()


class NcclLikeGroup(dist.ProcessGroup):
    """One communicator."""

    def __init__(self, device: _Device, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.device = device
        self._gloo = dist.ProcessGroup(store, rank, size)
        kind = dist.ProcessGroup.BackendType.GLOO
        backend = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._gloo._register_backend(torch.device("cpu"), kind, backend)
        self._gloo._set_default_backend(kind)
        self._gloo._set_group_name(f"gloo below {id(self)}")
        self._stream = ThreadPoolExecutor(max_workers=1)

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
    ) -> _Operation:  # fmt: skip
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

        operation = _Operation(name, self, peer, reads, writes)
        self._stream.submit(operation.run, device.post(operation, asynchronous), move_late)
        return operation


def _collective(name: str) -> Callable[..., dist.Work | None]:
    written, read = _COLLECTIVES[name]

    def collective(self: NcclLikeGroup, *args: Any) -> dist.Work | None:
        options = args[-1]
        reads, writes = (list(_tensors([args[number] for number in numbers])) for numbers in (read, written))
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


class _Stream(TorchDispatchMode):
    """Every op of this thread, as the stream would do it."""

    def __init__(self, device: _Device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        looks = self._device.sees and self._device.posted
        if looks and not func.is_view and func._overloadpacket.__name__ not in _SHAPE_ONLY:
            mutable = _mutable(func)
            for name, value in (*enumerate(args), *kwargs.items()):
                for tensor in _tensors(value):
                    self._device.touch(tensor, name in mutable, str(func))
        return func(*args, **kwargs)


def install(rank: int) -> None:
    """Register the backend in this process and let its stream see every op of this thread from here on."""
    device = _Device(rank)
    dist.Backend.register_backend(BACKEND, functools.partial(NcclLikeGroup, device), devices=["cpu"])
    for name in ("numpy", "tolist"):
        setattr(torch.Tensor, name, _looked_at(device, getattr(torch.Tensor, name)))
    _Stream(device).__enter__()


def synchronize(timeout: float = _PATIENCE) -> None:
    """As `torch.cuda.synchronize`, for a rank whose default group is of this backend.

    Raises:
        StuckError: something that was posted is not done within `timeout` seconds; on a GPU this would hang.
    """
    dist.group.WORLD.device.synchronize(timeout)


def _looked_at(device: _Device, read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def reading(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        device.touch(tensor, False, read.__name__)
        return read(tensor, *args, **kwargs)

    return reading


@functools.cache
def _mutable(func: Any) -> frozenset[int | str]:
    """Positions and names of the arguments that an op writes."""
    arguments = enumerate(func._schema.arguments)
    written = [(number, a.name) for number, a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return frozenset(key for pair in written for key in pair)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _replaced(value: Any, copies: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(each, copies) for each in value)
    return copies.get(id(value), value)


def _among(tensor: torch.Tensor, others: list[torch.Tensor]) -> bool:
    return any(tensor is other for other in others)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor lies in memory, from its first byte to behind its last; nowhere if it has no memory."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize

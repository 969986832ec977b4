"""The stream of a device that the CPU plays, and what it has under way: who touches that too early is told.

Computation on the CPU is synchronous, so a TorchDispatchMode plays the stream.  An op on what a message or a collective
writes blocks until it is there, if someone has waited for it, as the stream would; if nobody has, it raises
`RaceError`, however late the data is.  So does an op that writes to what a message reads.  `numpy` and `tolist`, which
no mode sees, are looked at as well; code that reads a tensor's memory by its address is not.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["PATIENCE", "Device", "Operation", "RaceError", "StuckError", "tensors_in"]

PATIENCE = 100.0
"""Seconds that the stream waits for one operation."""

# Ops that take a tensor for its shape only; views are told by their schemas.
_SHAPE_ONLY = ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_empty_strided", "new_zeros",
               "new_ones", "new_full", "rand_like", "randn_like")  # fmt: skip


class RaceError(Exception):
    """Something touched a buffer that an operation nobody has waited for reads or writes."""


class StuckError(Exception):
    """An operation that the device waits for is not done in time."""


class Operation(dist.Work):
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
        self, name: str, group: dist.ProcessGroup, peer: int | None, reads: list[torch.Tensor],
        writes: list[torch.Tensor],
    ) -> None:  # fmt: skip
        super().__init__()
        self.name, self.group, self.peer = name, group, peer
        self.read, self.written = list(map(_span, reads)), list(map(_span, writes))
        self.ordered = False
        self._kept = reads, writes
        self._done = threading.Event()
        self._error: BaseException | None = None

    def run(self, after: Iterable[Operation], move: Callable[[], None]) -> None:
        """Do it once the stream has come to it; called in the communicator's thread."""
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

    def finish(self, patience: float = PATIENCE, late: type[Exception] = StuckError) -> None:
        """Block until it is done.  Raises what it failed with, or `late`."""
        if not self._done.wait(patience):
            raise late(f"{self} timed out after {patience:g} s")
        if self._error is not None:
            raise self._error

    def __str__(self) -> str:
        return f"{self.name} of {self.group.group_desc or 'a group'} ({self.group.size()} ranks)"


class Device:
    """What one rank has posted and nothing has made sure of yet, in order."""

    def __init__(self, rank: int) -> None:
        self.random = random.Random(rank)
        self.posted: list[Operation] = []
        self.sees = True  # what this process computes is what the stream does

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Within it, what is computed is this backend's own work."""
        self.sees = False
        try:
            yield
        finally:
            self.sees = True

    def post(self, operation: Operation, asynchronous: bool) -> list[Operation]:
        """The operation stands in the stream.  Returns what comes before it there."""
        before = [other for other in self.posted if other.ordered and not other.is_completed()]
        operation.ordered = not asynchronous
        self.posted.append(operation)
        return before

    def order(self, operation: Operation) -> None:
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

    def watch(self) -> None:
        """See every op of this thread from here on."""
        for name in ("numpy", "tolist"):
            setattr(torch.Tensor, name, _looked_at(self, getattr(torch.Tensor, name)))
        _Stream(self).__enter__()


class _Stream(TorchDispatchMode):
    """Every op of this thread, as the stream would do it."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        looks = self._device.sees and self._device.posted
        if looks and not func.is_view and func._overloadpacket.__name__ not in _SHAPE_ONLY:
            mutable = _mutable(func)
            for name, value in (*enumerate(args), *kwargs.items()):
                for tensor in tensors_in(value):
                    self._device.touch(tensor, name in mutable, str(func))
        return func(*args, **kwargs)


def _looked_at(device: Device, read: Callable[..., Any]) -> Callable[..., Any]:
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


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor lies in memory, from its first byte to behind its last; nowhere if it has no memory."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize

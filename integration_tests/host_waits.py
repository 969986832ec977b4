"""Where the host waits for the device, seen on a machine that has none.

The CPU plays both.  What tells them apart is where a tensor comes from: `on_host` marks what a data loader gives, and
what is computed from that lies on the host as well, until it is uploaded; every other tensor lies on the device.  A
tensor on the host says that its device is another one than the engine's, so that the code under test takes the path
that it takes on CUDA.  A `HostCopy` lies on the host from when it has said that it arrived.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from paci_schedule.runtime.host_copy import HostCopy
from testing.megatron_cpu import shim

__all__ = ["HostWaits"]

_HOST = torch.device("cpu", 1)  # of the same type as the CPU that plays the device, yet not equal to it
_DOWNLOADS = (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist)


class HostWaits(TorchFunctionMode):
    """Records the waits of the host for the device while it is active.

    Attributes:
        seen: (what, file, function) of each wait: what is "reads an element", "uploads and waits", "downloads and
            waits", "synchronises" or "waits with a timeout", which on NCCL keeps the host where it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str, str]] = set()
        self._host: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._reads = _Reads(self)
        self._patches = [
            mock.patch.object(owner, "synchronize", self._synchronised)
            for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream)
        ]
        self._patches.append(mock.patch.object(dist.Work, "wait", self._noting_timeouts(dist.Work.wait)))
        self._patches.append(mock.patch.object(HostCopy, "has_arrived", lambda copy: self._arrived(copy)))

    def on_host(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, in pageable memory of the host, each a copy."""
        for batch in batches:
            yield tree_map_only(torch.Tensor, lambda tensor: self._mark(tensor.clone(), self._host), batch)

    def __enter__(self) -> HostWaits:
        for patch in self._patches:
            patch.start()
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)
        for patch in self._patches:
            patch.stop()

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        of_host = any(tensor.untyped_storage() in self._host for tensor in tensors)
        if not of_host:
            if function in _DOWNLOADS:
                self.note("downloads and waits")
            return function(*args, **kwargs)
        first = tensors[0]
        if function == torch.Tensor.device.__get__:
            return _HOST
        if function == torch.Tensor.is_pinned:
            return first.untyped_storage() in self._pinned
        if function == torch.Tensor.pin_memory:
            return self._mark(first.clone(), self._host, self._pinned)
        if function in (torch.Tensor.to, torch.Tensor.cuda) and not _is_conversion(args, kwargs):
            if not (kwargs.get("non_blocking") and first.untyped_storage() in self._pinned):
                self.note("uploads and waits")
            return first.clone()
        made = function(*args, **kwargs)
        return tree_map_only(torch.Tensor, lambda tensor: self._mark(tensor, self._host), made)

    def note(self, what: str) -> None:
        """Record the caller outside of PyTorch, of the processes' plumbing, of what plays CUDA and of this file."""
        frame = sys._getframe(1)
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename in (__file__, shim.__file__):
            frame = frame.f_back
        self.seen.add((what, frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name))

    def _synchronised(self, *_: Any) -> None:
        self.note("synchronises")

    def _arrived(self, copy: HostCopy) -> bool:
        self._mark(copy._host, self._host)
        return True

    def _noting_timeouts(self, wait: Callable[..., bool]) -> Callable[..., bool]:
        def noted(work: dist.Work, *timeout: timedelta) -> bool:
            if timeout and timeout[0]:
                self.note("waits with a timeout")
            return wait(work, *timeout)

        return noted

    @staticmethod
    def _mark(tensor: torch.Tensor, *kinds: weakref.WeakSet) -> torch.Tensor:
        for kind in kinds:
            kind.add(tensor.untyped_storage())
        return tensor


class _Reads(TorchDispatchMode):
    """Sees an element made into a Python number, also inside a backward."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self._waits.note("reads an element")
        return function(*args, **(kwargs or {}))


def _is_conversion(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether such a call of `to` names only a dtype, or another tensor."""
    named = [*args[1:], *kwargs.values()]
    return (
        "device" not in kwargs
        and bool(named)
        and all(isinstance(value, (torch.dtype, torch.Tensor, bool)) for value in named)
    )

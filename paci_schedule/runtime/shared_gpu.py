"""A torch.distributed backend for ranks that share a GPU, which NCCL refuses: messages go through host memory.

With it a pipeline of several stages can be tried on a machine with one GPU; it is too slow to train with.  Collectives
are gloo's own, since gloo takes CUDA tensors for them.  It takes point-to-point messages only on the host, so these are
copied there and back, and a send waits for the device.  Everything above (links, DeepSpeed) runs unchanged.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["BACKEND", "SharedGpuGroup", "share_gpus"]

BACKEND = "shared_gpu"

logger = logging.getLogger(__name__)

_COLLECTIVES = (
    "allgather",
    "_allgather_base",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "scatter",
)


class _Arriving(dist.Work):
    """A receive into host memory; waiting for it copies it to where it belongs."""

    def __init__(self, work: dist.Work, host: torch.Tensor, target: torch.Tensor) -> None:
        super().__init__()
        self._work, self._host, self._target = work, host, target

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._work.wait(timeout)
        self._target.copy_(self._host)
        return True

    def is_completed(self) -> bool:
        return self._work.is_completed()


class _Leaving(dist.Work):
    """A send from host memory, which it keeps until the send is done."""

    def __init__(self, work: dist.Work, host: torch.Tensor) -> None:
        super().__init__()
        self._work, self._host = work, host

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return self._work.wait(timeout)

    def is_completed(self) -> bool:
        return self._work.is_completed()


class SharedGpuGroup(dist.ProcessGroup):
    """A gloo process group whose point-to-point messages may be CUDA tensors."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]: torch's stub lacks this constructor
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return BACKEND

    def send(self, tensors: list[torch.Tensor], dstRank: int, tag: int) -> dist.Work:
        if _is_on_host(tensors[0]):
            return self._gloo.send(tensors, dstRank, tag)
        host = tensors[0].cpu()
        return _Leaving(self._gloo.send([host], dstRank, tag), host)

    def recv(self, tensors: list[torch.Tensor], srcRank: int, tag: int) -> dist.Work:
        if _is_on_host(tensors[0]):
            return self._gloo.recv(tensors, srcRank, tag)
        host = torch.empty_like(tensors[0], device="cpu")
        return _Arriving(self._gloo.recv([host], srcRank, tag), host, tensors[0])


def _is_on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _delegated(name: str) -> Any:
    def collective(self: SharedGpuGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._gloo, name)(*args, **kwargs)

    collective.__name__ = name
    return collective


for _name in _COLLECTIVES:
    setattr(SharedGpuGroup, _name, _delegated(_name))


def share_gpus() -> bool:
    """Set up this rank to share its GPU, where the machine has fewer GPUs than it runs ranks.

    It must be called before `torch.distributed` is initialised and before the training script reads its environment:
    LOCAL_RANK becomes the index of the shared GPU, and the default process group is one of this backend.

    Returns:
        Whether the GPU is shared.
    """
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not 0 < gpus < ranks or dist.is_initialized():
        return False
    local_rank = int(os.environ["LOCAL_RANK"])
    os.environ["LOCAL_RANK"] = str(local_rank % gpus)
    torch.cuda.set_device(local_rank % gpus)
    dist.Backend.register_backend(BACKEND, SharedGpuGroup, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND)
    logger.warning(
        "%d ranks share %d GPU(s): messages between them go through host memory; good to try things out, not to time",
        ranks,
        gpus,
    )
    return True

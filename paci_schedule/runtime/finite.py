"""Is what a stage computes finite?  The device says so late, and is not waited for while micro-batches follow.

What a stage hands on is looked at, the losses, and the weights after each update: a gradient that is not finite makes
weights that are not.  The host hears of it where it has the answer anyhow; where the pipe is empty it waits for all of
them, so nothing that is not finite gets into a checkpoint without a word.

A stage that is to leave out such an update has to know before it steps: `may_step` waits for the stage's own device.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable

import torch
import torch.distributed as dist

from paci_schedule.errors import NonfiniteError
from paci_schedule.runtime.host_copy import HostCopy

__all__ = ["FiniteGuard", "may_step"]

logger = logging.getLogger(__name__)


def may_step(
    stage: int, gradients: Iterable[torch.Tensor], device: torch.device, group: dist.ProcessGroup | None = None
) -> bool:
    """Whether the gradients of an update have a finite norm, on all ranks of a group, which waits for their devices.

    Args:
        stage: this rank's.
        gradients: what this rank's optimizer takes.
        device: where they are.
        group: the ranks that decide together; None for this one alone.
    """
    norms = [_norm(each._values() if each.is_sparse else _local(each), 2) for each in gradients]
    total = torch.stack([*norms, torch.zeros((), device=device)]).square().sum()
    finite = total.isfinite().int().reshape(1)
    if group is not None:
        dist.all_reduce(finite, dist.ReduceOp.MIN, group=group)
    if finite.item():
        return True
    logger.warning("stage %d (rank %d) leaves out an update: its gradient is not finite", stage, dist.get_rank())
    return False


class FiniteGuard:
    """Raises NonfiniteError, which names stage and micro-batch, soon after something is not finite.

    Args:
        stage: this rank's.
    """

    def __init__(self, stage: int) -> None:
        self._stage = stage
        self._looked: deque[tuple[str, HostCopy]] = deque()

    def look(self, what: str, tensors: Iterable[torch.Tensor]) -> None:
        """Look at tensors; on a CPU the answer is there at once.

        Args:
            what: "the activation of micro-batch 3".
            tensors: of any shapes; those that are not floating-point are left out.
        """
        largest = [
            _norm(tensor, float("inf"))
            for tensor in map(_local, tensors)
            if tensor.is_floating_point() and tensor.numel()
        ]
        if largest:
            self._looked.append((what, HostCopy(torch.stack(largest).amax().reshape(1))))
        self._hear(waits=False)

    def settle(self) -> None:
        """Wait for every answer."""
        self._hear(waits=True)

    def _hear(self, waits: bool) -> None:
        while self._looked and (waits or self._looked[0][1].has_arrived()):
            what, copy = self._looked.popleft()
            (largest,) = copy.numbers()
            if largest - largest != 0.0:
                self._looked.clear()
                raise NonfiniteError(
                    f"stage {self._stage} (rank {dist.get_rank()}): {what} is not finite: its largest element is "
                    f"{largest}.  If several stages say so, an activation comes from the lowest one, a gradient from "
                    "the highest.  Start again from the last checkpoint, which is finite, and leave out the data of "
                    'this micro-batch or lower the learning rate; with "on_nonfinite": "ignore" the job trains on'
                )


def _norm(tensor: torch.Tensor, order: float) -> torch.Tensor:
    """float32[], in which a sum of low precision does not overflow."""
    dtype = None if tensor.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(tensor.detach(), order, dtype=dtype).float()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor that several ranks share."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()

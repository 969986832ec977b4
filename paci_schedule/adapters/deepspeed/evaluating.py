"""The messages of DeepSpeed's evaluation, which end in time, and with the name of the stage that did not answer.

They run in the job's default group, and on gloo they last as long as it was told to when it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.topology import PipelineParallelGrid

from paci_schedule.runtime.waiting import begun, waiting

__all__ = ["timed_messages"]


@contextmanager
def timed_messages(grid: PipelineParallelGrid, device: torch.device, timeout: timedelta) -> Iterator[None]:
    """While it lasts, DeepSpeed's messages between stages take no longer than `timeout`.

    On CUDA nothing changes: there the host would have to wait for the device.

    Args:
        grid: of the job.
        device: where the stage computes.
        timeout: of one message.
    """

    def timed(begin: Callable[[torch.Tensor, int], dist.Work | None], doing: str) -> Callable[..., None]:
        def transfer(tensor: torch.Tensor, stage: int, async_op: bool = False) -> None:
            peer = grid.stage_to_global(stage_id=stage)
            with waiting(grid.get_stage_id(), f"evaluated, and {doing}", f"stage {stage}", [peer], timeout):
                begun(begin(tensor, peer)).wait(timeout)

        return transfer

    stock = p2p.send, p2p.recv
    if device.type == "cpu":
        p2p.send, p2p.recv = timed(dist.isend, "sent a message to"), timed(dist.irecv, "waited for a message from")
    try:
        yield
    finally:
        p2p.send, p2p.recv = stock

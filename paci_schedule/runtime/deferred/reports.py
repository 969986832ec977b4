"""Sums over all stages that are only reported: they travel down with the activations to the last stage.

A stage adds its own part to the sum that came with the newest activation, and hands the result on.  So at update v,
with d the look-ahead and a the micro-batches to an update, the last stage reports its own part of update v and, of a
stage r before it, that of update v - ceil((d_r + 1) / a).  Nobody waits for it.  Where the pipe is empty, and at the
first ceil(P / a) updates of a run, whose reports have not arrived yet, the sum is taken at once, over all stages.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from paci_schedule.errors import UnsupportedError
from paci_schedule.runtime.deferred.stand_in import StandIn, order

__all__ = ["CarriedReports", "ReportGroup"]


class CarriedReports:
    """What a stage reports of each update, and the newest sums of the stages before it.

    Args:
        size: how many numbers an update reports at most.
        device: where they live.

    Attributes:
        at_once: whether the sums of this update are taken at once, over all stages.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.at_once = True
        self._own, self._before = torch.zeros(size, device=device), torch.zeros(size, device=device)
        self._used = 0

    def begin_update(self, at_once: bool) -> None:
        """The sums that are asked for from now on are those of the next update."""
        self.at_once, self._used = at_once, 0

    def put(self, part: torch.Tensor) -> torch.Tensor:
        """Report this stage's part of the update's next sum.  Returns the newest sum of the stages before it.

        Raises:
            UnsupportedError: an update reports more numbers than fit.
        """
        begin, end = self._used, self._used + part.numel()
        if end > self._own.numel():
            raise UnsupportedError(
                f"{end} numbers are reported in one update, and messages have room for {self._own.numel()}: log fewer "
                "metrics"
            )
        self._used = end
        self._own[begin:end] = part.detach().flatten()
        return self._before[begin:end].view(part.shape)

    def going_down(self) -> torch.Tensor:
        """float32[size]: the sums over this stage and those before it, for the next activation to carry."""
        return self._before + self._own

    def came_down(self, sums: torch.Tensor) -> None:
        """Take in the sums over the stages before this one that an activation carried."""
        self._before = sums


class ReportGroup(StandIn):
    """The group of all stages as code that reports should see it: a sum over it asks no other stage.

    Args:
        reports: of this stage.
        whole: the group of the ranks of all stages.
        members: the group of those of them that belong to this stage; None where this rank alone does.
    """

    def __init__(self, reports: CarriedReports, whole: dist.ProcessGroup, members: dist.ProcessGroup | None) -> None:
        super().__init__(whole, [dist.get_rank()] if members is None else dist.get_process_group_ranks(members))
        self._reports, self._whole, self._members = reports, whole, members

    def getBackendName(self) -> str:
        return "carried-reports"

    def allreduce(  # pyright: ignore[reportIncompatibleMethodOverride]: torch calls it by position, and NCCL gives None
        self, tensors: list[torch.Tensor], options: dist.AllreduceOptions
    ) -> dist.Work | None:
        [total] = tensors
        own = total.clone()
        if self._members is not None:
            order(self._members.allreduce([own], options))
        before = self._reports.put(own)
        if self._reports.at_once:
            return self._whole.allreduce(tensors, options)
        torch.add(own, before, out=total)
        return _Done()


class _Done(dist.Work):
    """Of a sum that no other rank takes part in."""

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        return True

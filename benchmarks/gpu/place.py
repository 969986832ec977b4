"""Where a step of `make gpu` runs: on the GPU, or in a dry run on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["NeedsGpu", "Place"]


class NeedsGpu(Exception):
    """A dry run has come to where only a GPU could go on."""


@dataclass(frozen=True)
class Place:
    """Where a step runs.

    Attributes:
        device: "cuda", or the CPU in a dry run.
        seconds: how long the step may take; the parent process ends it then.
    """

    device: torch.device
    seconds: float

    @property
    def dry(self) -> bool:
        """True in a dry run, where sizes are small and times mean nothing."""
        return self.device.type != "cuda"

    def require_gpu(self, why: str) -> None:
        """Raises NeedsGpu in a dry run: `why` says what the CPU cannot do."""
        if self.dry:
            raise NeedsGpu(why)

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        if not self.dry:
            torch.cuda.synchronize()

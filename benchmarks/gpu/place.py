"""Where a step of `make gpu` runs: on the GPU, or in a dry run on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Failed", "Place", "Unavailable"]


class Unavailable(Exception):
    """A step cannot be done here: a dry run has come to where only a GPU could go on, or PyTorch lacks something."""


class Failed(Exception):
    """The answer to a step's question is "no".

    Args:
        why: what is wrong.
        figures: what the step has found all the same.
    """

    def __init__(self, why: str, figures: dict[str, Any]) -> None:
        super().__init__(why)
        self.figures = figures


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
        """Raises Unavailable in a dry run: `why` says what the CPU cannot do."""
        if self.dry:
            raise Unavailable(f"needs a GPU: {why}")

"""This rank's device, chosen as DeepSpeed's engine chooses it, before anything of ours allocates or communicates."""

from __future__ import annotations

import os
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

__all__ = ["current_device", "take_device"]


def current_device() -> torch.device:
    """The device that is this process's current one."""
    accelerator: Any = get_accelerator()  # DeepSpeed declares no types of it
    return torch.device(accelerator.current_device_name())


def take_device(args: Any = None) -> torch.device:
    """Make this rank's device the current one.  NCCL runs collectives of Python objects on the current device.

    DeepSpeed does the same at the end of its engine's set-up (`DeepSpeedEngine._set_distributed_vars`).

    Args:
        args: what `deepspeed.initialize` was given; its `device_rank`, where it has one, comes before LOCAL_RANK.
    """
    index = getattr(args, "device_rank", None)
    if index is None:
        index = int(os.environ["LOCAL_RANK"])
    if index < 0:
        return current_device()
    accelerator: Any = get_accelerator()
    accelerator.set_device(index)
    return torch.device(accelerator.device_name(index))

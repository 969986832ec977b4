"""What Megatron's token dispatcher for all-to-all takes from a tensor's being on a GPU, for a CPU that plays one."""

from __future__ import annotations

import importlib
from typing import Any

import torch

__all__ = ["install"]


def install() -> None:
    """Let it hand its collectives numbers, as it does where they come from a GPU.  Imports Megatron-core."""

    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    for name in ("moe_utils", "token_dispatcher"):
        vars(importlib.import_module(f"megatron.core.transformer.moe.{name}"))["maybe_move_tensor_to_cpu"] = moved

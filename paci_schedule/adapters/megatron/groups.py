"""Megatron-core's process groups as what they are; `parallel_state` says nothing of their types."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

__all__ = ["embedding", "experts", "pipeline", "replicas", "stage", "tensor_parallel"]

_state: Any = parallel_state


def tensor_parallel() -> dist.ProcessGroup:
    """The ranks that share this stage's layers."""
    return _state.get_tensor_model_parallel_group()


def stage() -> dist.ProcessGroup:
    """The ranks of this stage: all replicas and all slices."""
    return _state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def experts() -> dist.ProcessGroup:
    """The ranks that share this stage's experts."""
    return _state.get_expert_tensor_and_model_parallel_group()


def replicas() -> dist.ProcessGroup:
    """The ranks of this stage that have other micro-batches, or other parts of their sequences."""
    return _state.get_data_parallel_group(with_context_parallel=True)


def pipeline() -> dist.ProcessGroup:
    """The stages of this rank's pipeline."""
    return _state.get_pipeline_model_parallel_group()


def embedding() -> dist.ProcessGroup | None:
    """The stages that hold a copy of the tied embedding; None where this rank's does not."""
    return _state.get_embedding_group(False)

"""The process grid as an optimizer should see it when stages update by themselves.

DeepSpeed's optimizers reduce gradient norms and overflow flags over the "model parallel" group, which spans the
pipeline stages: a flush in disguise.  To them, this grid is that of one stage.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid

__all__ = ["StageMpu"]


class StageMpu:
    """One stage's view of a PipelineParallelGrid: model parallelism is tensor slicing alone, the pipe has one stage.

    Everything else is the grid's own answer.

    Args:
        grid: the job's.
        model_parallel: what stands for the group of all model-parallel ranks; None for the tensor-slicing group.
    """

    def __init__(self, grid: PipelineParallelGrid, model_parallel: dist.ProcessGroup | None = None) -> None:
        self._grid = grid
        self._model_parallel = model_parallel or grid.get_slice_parallel_group()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model_parallel

    def get_model_parallel_rank(self) -> int:
        return self._grid.get_slice_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        return self._grid.get_slice_parallel_world_size()

    def get_pipe_parallel_world_size(self) -> int:
        return 1

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

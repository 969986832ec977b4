"""Which of Megatron-core's internals the schedule stands on, and whether this Megatron-core still has them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

from packaging.specifiers import SpecifierSet

from paci_schedule.adapters.probing import TORCH_HOOKS, found_in, look_up, require
from paci_schedule.adapters.versions import MEGATRON_CORE

__all__ = ["TESTED", "check_installed", "gone", "loaded", "probe", "put_back", "replace", "stock_of"]

TESTED = SpecifierSet(MEGATRON_CORE)

_STOCK = "stock"  # of a function of ours: Megatron-LM's own
_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_HOOKS = {
    f"{_SCHEDULES}:forward_backward_pipelining_without_interleaving": ("model", "num_microbatches", "forward_only"),
    f"{_SCHEDULES}:forward_backward_pipelining_with_interleaving": ("model", "num_microbatches", "forward_only"),
    f"{_SCHEDULES}:forward_backward_no_pipelining": ("model", "num_microbatches", "forward_only"),
    f"{_SCHEDULES}:forward_step": ("forward_step_func", "num_microbatches", "is_first_microbatch", "is_last_stage"),
    f"{_SCHEDULES}:backward_step": ("input_tensor", "output_tensor", "output_tensor_grad", "config"),
    f"{_SCHEDULES}:deallocate_output_tensor": ("out", "deallocate_pipeline_outputs"),
    "megatron.core.distributed.finalize_model_grads:_allreduce_word_embedding_grads": (),
    "megatron.core.pipeline_parallel.p2p_communication:_batched_p2p_ops": ("prev_pipeline_rank", "next_pipeline_rank"),
    "megatron.core.pipeline_parallel.p2p_communication:_p2p_ops": ("prev_pipeline_rank", "next_pipeline_rank"),
    "megatron.core.utils:get_model_config": (),
    "megatron.core.utils:make_viewless_tensor": ("inp", "requires_grad", "keep_graph"),
    "megatron.core.optimizer.optimizer:MegatronOptimizer.get_grad_stats_parallel_group": (),
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.get_grad_stats_parallel_group": (),
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._get_model_param_range_map": ("param",),
    "megatron.core.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer.get_grad_norm": (),
    "megatron.core.parallel_state:get_tensor_and_data_parallel_group": ("with_context_parallel",),
    "megatron.core.parallel_state:get_embedding_group": ("check_initialized",),
    "torch._utils:_flatten_dense_tensors": (),
    "torch._utils:_unflatten_dense_tensors": (),
    **TORCH_HOOKS,
}


def probe() -> list[tuple[str, bool, str]]:
    """What the schedule needs: (name, whether it is there, what was found).  Imports Megatron-core."""
    folder = found_in("megatron.core")
    if folder is None:
        beside = found_in("megatron")
        detail = f"the folder {beside} has none" if beside else f"not installed; pip install 'megatron-core{TESTED}'"
        return [("megatron-core", False, detail)]
    try:
        found = getattr(import_module("megatron.core"), "__version__", None)
    except Exception as error:  # another project's copy may fail in any way
        return [("megatron-core", False, f"{folder} cannot be imported: {type(error).__name__}: {error}")]
    if found is None:
        return [("megatron-core", False, f"{folder} says no version, so it is another project's copy; tested {TESTED}")]
    return [
        ("megatron-core", TESTED.contains(found, prereleases=True), f"{found} in {folder}, tested {TESTED}"),
        *(look_up(*hook) for hook in _HOOKS.items()),
    ]


def check_installed() -> None:
    """Raises UnsupportedError, naming what is missing, unless the schedule can run on this Megatron-core."""
    require(probe(), f"paci_schedule cannot register with this Megatron-core; use one in {TESTED}")


def loaded(module: str) -> Any:
    """A module of Megatron's that is imported already, to read its names or to give them another meaning."""
    return sys.modules[module]


def stock_of(module: Any, name: str) -> Any:
    """Megatron-LM's own function of that name, also where `replace` has put another one in its place."""
    there = getattr(module, name)
    return getattr(there, _STOCK, there)


def replace(module: Any, name: str, ours: Any) -> None:
    """Put a function of ours in the place of Megatron-LM's own."""
    setattr(ours, _STOCK, stock_of(module, name))
    setattr(module, name, ours)


def put_back(module: Any, names: Iterable[str]) -> None:
    """Give the names of a module their own meaning again, where `replace` has given them another one."""
    for name in names:
        setattr(module, name, stock_of(module, name))


def gone(rebound: Mapping[str, Iterable[str]], project: str, supported: str) -> Iterator[str]:
    """Which names a project's training loop has no more that are to get another meaning, each with what to do.

    Args:
        rebound: of every module the names.
        project: "Megatron-LM".
        supported: what has them: "version 0.7".
    """
    for module, names in rebound.items():
        for name in names:
            if not hasattr(loaded(module), name):
                yield f"{module}.{name} is gone in this {project}: use {supported}"

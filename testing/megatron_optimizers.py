"""Megatron-core's optimizers by the names that --optimizer has for them, as its two supported versions build them.

All but Adam and SGD come from the package emerging_optimizers: 0.1.0, which is not on PyPI, for 0.16.1, and 0.3.0 for
Megatron-LM's main.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from testing.megatron_model import GptJob

__all__ = ["OF_ALL", "OF_MAIN", "build_optimizer", "is_main", "missing", "wrapped"]

OF_ALL = ("muon",)
"""From emerging_optimizers, in both versions."""

OF_MAIN = ("adaptive_muon", "lion", "soap")
"""From emerging_optimizers, only in Megatron-LM's main."""

_PACKAGE = "emerging_optimizers"


def is_main() -> bool:
    """Whether the Megatron-core that is imported here is Megatron-LM's main, not 0.16.1."""
    core = importlib.util.find_spec("megatron.core")  # the module itself wants the CPU to play CUDA
    return core is not None and Path(core.origin).with_name("optimizer").joinpath("emerging_optimizers.py").is_file()


def missing(name: str, main: bool) -> str | None:
    """Why an optimizer cannot be built by 0.16.1, or by Megatron-LM's main; None if it can."""
    if name not in (*OF_ALL, *OF_MAIN):
        return None
    if name in OF_MAIN and not main:
        return "only Megatron-LM's main has it: put a checkout of it first on PYTHONPATH"
    wanted = "0.3.0" if main else "0.1.0"
    if importlib.util.find_spec(_PACKAGE) is None:
        return f"{_PACKAGE} {wanted} is not on PYTHONPATH (docs/megatron.md says how to get it)"
    found = importlib.import_module(f"{_PACKAGE}.package_info").__version__
    return None if found.startswith(wanted) else f"{_PACKAGE} {wanted} is what this Megatron takes, {found} was found"


def wrapped(job: GptJob, config: Any, model: torch.nn.Module) -> torch.nn.Module:
    """The model in DDP, as the job's optimizer wants it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=job.distributed_optimizer,
        overlap_grad_reduce=job.overlap_grad_reduce,
        overlap_param_gather=job.overlap_param_gather,
        grad_reduce_in_fp32=True,
    )
    layout = {}
    if job.layer_wise and job.distributed_optimizer:  # matrices and all else in buffers of their own: only main
        from megatron.core import parallel_state
        from megatron.core.optimizer import layer_wise_optimizer as layer_wise

        layer_wise.tag_params_for_buffer_routing([model])
        layout["full_param_layout"] = layer_wise.LayerWiseDistributedOptimizer.compute_full_param_layout(
            list(model.parameters()), None, parallel_state.get_data_parallel_world_size(), ddp
        )
    return DistributedDataParallel(config, ddp, model, **layout)


def build_optimizer(job: GptJob, model: torch.nn.Module, dtype: torch.dtype) -> Any:
    """The optimizer of a model in DDP.

    "matrices" is a chain of two, as Megatron's with Muon, that needs no package: SGD with momentum for matrices, and
    Adam for all else.
    """
    from megatron.core import optimizer as core
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    emerging = job.optimizer in (*OF_ALL, *OF_MAIN)
    settings = {"use_layer_wise_distributed_optimizer": True} if emerging and job.layer_wise and is_main() else {}
    config = core.OptimizerConfig(
        optimizer="adam" if job.optimizer == "matrices" else job.optimizer,
        lr=job.lr,
        weight_decay=0.01,
        clip_grad=job.clip_grad,
        bf16=job.bf16,
        params_dtype=dtype,
        log_num_zeros_in_grad=job.count_zeros,
        overlap_param_gather=job.overlap_param_gather,
        use_distributed_optimizer=job.distributed_optimizer and not job.layer_wise,
        **settings,
    )
    if emerging and not is_main():
        from megatron.core.optimizer.muon import get_megatron_muon_optimizer

        return get_megatron_muon_optimizer(config, [model], layer_wise_distributed_optimizer=job.layer_wise)
    if job.optimizer != "matrices":
        return core.get_megatron_optimizer(config, [model])
    both = _matrices_and_others(job, model)
    if not job.bf16:
        both = [FP32Optimizer(optimizer, config, None) for optimizer in both]
    if job.layer_wise:
        return LayerWiseDistributedOptimizer(both, config, ProcessGroupCollection.use_mpu_process_groups())
    if job.bf16:
        both = [Float16OptimizerWithFloat16Params(optimizer, config, None, None) for optimizer in both]
    return core.ChainedOptimizer(both)


def _matrices_and_others(job: GptJob, model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    same = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        embeds = getattr(parameter, "is_embedding_or_output_parameter", False)
        groups[parameter.dim() == 2 and not embeds].append(parameter)
    matrices, others = ([{"params": groups[which], **same}] for which in (True, False))
    return [torch.optim.SGD(matrices, lr=job.lr, momentum=0.9), torch.optim.AdamW(others, lr=job.lr)]

"""Which of DeepSpeed's internals the engine stands on, and whether this DeepSpeed still has them."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from paci_schedule.adapters.probing import TORCH_HOOKS, look_up, require
from paci_schedule.adapters.ranks import is_rank_0
from paci_schedule.adapters.versions import DEEPSPEED

__all__ = [
    "SPLIT_HOOKS",
    "TESTED",
    "check_installed",
    "probe",
    "warn_if_untested",
]

logger = logging.getLogger(__name__)

TESTED = SpecifierSet(DEEPSPEED)

_ENGINE = "deepspeed.runtime.pipe.engine:PipelineEngine"
_HOOKS = {
    "deepspeed:initialize": (),
    "deepspeed.runtime.engine:DeepSpeedEngine.__init__": ("model", "config_class"),
    _ENGINE: (),
    f"{_ENGINE}._INSTRUCTION_MAP": (),
    f"{_ENGINE}._exec_schedule": ("pipe_schedule",),
    "deepspeed.runtime.pipe.schedule:TrainSchedule.steps": (),
    f"{_ENGINE}._exec_load_micro_batch": ("buffer_id",),
    f"{_ENGINE}._next_batch": (),
    f"{_ENGINE}._exec_forward_pass": ("buffer_id",),
    f"{_ENGINE}._exec_backward_pass": ("buffer_id",),
    f"{_ENGINE}._exec_reduce_grads": (),
    f"{_ENGINE}._exec_optimizer_step": (),
    f"{_ENGINE}._reserve_pipe_buffers": ("num_buffers",),
    f"{_ENGINE}._configure_optimizer": ("client_optimizer", "model_parameters"),
    f"{_ENGINE}.fp16_enabled": (),
    f"{_ENGINE}.bfloat16_enabled": (),
    f"{_ENGINE}.clip_fp32_gradients": (),
    f"{_ENGINE}.set_dataiterator": ("iterator",),
    f"{_ENGINE}.reset_activation_shape": (),
    f"{_ENGINE}.set_train_micro_batch_size": ("micro_batch_size",),
    f"{_ENGINE}.destroy": (),
    f"{_ENGINE}.save_checkpoint": ("save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters"),
    f"{_ENGINE}.load_checkpoint": ("load_dir", "tag"),
    "deepspeed.runtime.pipe.p2p:send": ("tensor", "dest_stage", "async_op"),
    "deepspeed.runtime.pipe.p2p:recv": ("tensor", "src_stage", "async_op"),
    "deepspeed.runtime.pipe.topology:PipelineParallelGrid.get_slice_parallel_group": (),
    "deepspeed.utils.groups:_create_expert_and_data_parallel": (
        "expert_parallel_size_",
        "use_data_before_expert_parallel_",
    ),
    "deepspeed.utils.groups:_get_expert_parallel_group_dict": (),
    "deepspeed.runtime.utils:is_model_parallel_parameter": ("p",),
    "deepspeed.runtime.utils:all_gather_dp_groups": ("groups_flat", "partitioned_param_groups", "dp_process_group"),
    "deepspeed.runtime.bf16_optimizer:BF16_Optimizer.get_grads_for_norm": ("for_clipping",),
    "deepspeed.runtime.bf16_optimizer:BF16_Optimizer.update_lp_params": (),
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.get_gradient_for_reduction": ("param",),
    "deepspeed.runtime.pipe.module:PipelineModule.get_tied_weights_and_groups": (),
    "deepspeed.runtime.pipe.module:PipelineModule._partition_layers": ("method",),
    "deepspeed.runtime.pipe.module:PipelineModule._set_bounds": ("start", "stop"),
    **TORCH_HOOKS,
}


_TORCH = "torch.distributed.pipelining._backward"
_BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
SPLIT_HOOKS = {
    f"{_TORCH}:stage_backward_input": ("stage_outputs_or_loss", "output_grads", "input_values", "weights"),
    f"{_TORCH}:stage_backward_weight": ("weights", "param_groups", "retain_graph"),
    "deepspeed.runtime.utils:OutputBackwardHookManager.remove_hooks": (),
    f"{_BF16}.update_hp_grads": ("clear_lp_grads",),
}
"""What a schedule that splits the backward needs besides; a job that asks for one is refused where it is missing."""


def probe() -> list[tuple[str, bool, str]]:
    """What the engine needs: (name, whether it is there, what was found).  Imports DeepSpeed."""
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        return [("deepspeed", False, f"not installed; pip install 'deepspeed{TESTED}'")]
    rest = "" if found in TESTED else "; untested, so that only the hooks are known to be there"
    return [("deepspeed", True, f"{found}, tested {TESTED}{rest}"), *(look_up(*hook) for hook in _HOOKS.items())]


def check_installed() -> None:
    """Raises UnsupportedError, naming what is missing, unless the engine can run on the installed DeepSpeed."""
    found = probe()
    require(found, f"paci_schedule cannot register with DeepSpeed {found[0][2]}; install deepspeed{TESTED}")


def warn_if_untested() -> None:
    """Say on rank 0 that the installed DeepSpeed, which has every hook, is outside the tested range."""
    found = version("deepspeed")
    if found not in TESTED and is_rank_0():
        logger.warning(
            "deepspeed %s is outside the tested range %s.  All %d hooks that the schedules stand on are there, but one "
            "may mean something else: compare the first losses with a run under 1F1B, or install deepspeed%s",
            found,
            TESTED,
            len(_HOOKS),
            TESTED,
        )

"""Which internals of torch.distributed.pipelining the schedule stands on, and whether this torch still has them."""

from __future__ import annotations

from paci_schedule.adapters.probing import TORCH_HOOKS, look_up, require

__all__ = ["check_installed", "probe"]

_STAGE = "torch.distributed.pipelining.stage:_PipelineStageBase"
_SCHEDULES = "torch.distributed.pipelining.schedules"
_HOOKS = {
    f"{_STAGE}.forward_maybe_with_nosync": (),
    f"{_STAGE}.backward_maybe_with_nosync": ("backward_type", "bwd_kwargs", "last_backward"),
    f"{_STAGE}.perform_reduce_grad": ("grad_scale_factor",),
    f"{_SCHEDULES}:PipelineScheduleSingle._split_inputs": ("args", "kwargs"),
    f"{_SCHEDULES}:PipelineScheduleSingle._merge_outputs": ("output_chunks",),
    f"{_SCHEDULES}:get_schedule_class": ("schedule_name",),
    **TORCH_HOOKS,
}


def probe() -> list[tuple[str, bool, str]]:
    """What the schedule needs: (name, whether it is there, what was found).  Imports torch."""
    return [look_up(*hook) for hook in _HOOKS.items()]


def check_installed() -> None:
    """Raises UnsupportedError, naming what is missing, unless the schedule can run on this torch."""
    require(probe(), "paci_schedule cannot run with this torch.distributed.pipelining")

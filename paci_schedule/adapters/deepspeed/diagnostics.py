"""DeepSpeed's measurements that tell nothing in a pipeline: they are switched off, so that no job fails of them."""

from __future__ import annotations

import logging

from deepspeed.runtime.config import DeepSpeedConfig

__all__ = ["switch_off_diagnostics"]

logger = logging.getLogger(__name__)


def switch_off_diagnostics(config: DeepSpeedConfig, stages: int, warns: bool) -> None:
    """Switch off what would fail or print nothing.

    Args:
        config: of the engine to be built; changed.
        stages: P.
        warns: whether this rank says so.
    """
    reasons = []
    if config.flops_profiler_config.enabled:
        config.flops_profiler_config.enabled = False
        # It has switched the timers on as well.
        config.wall_clock_breakdown = bool(config._param_dict.get("wall_clock_breakdown"))
        reasons.append(
            '"flops_profiler": a pipeline engine of DeepSpeed never prints its profile; '
            "paci_schedule.adapters.deepspeed.layer_costs measures layers"
        )
    if config.wall_clock_breakdown and stages > 1:
        config.wall_clock_breakdown = False
        reasons.append(
            '"wall_clock_breakdown": DeepSpeed starts the same timer twice on every stage but the last; '
            'engine.pipeline_stats() and "paci": {"record": FOLDER} say where the time goes'
        )
    for reason in reasons:
        if warns:
            logger.warning("switched off %s", reason)

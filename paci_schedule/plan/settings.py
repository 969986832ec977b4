"""The settings of a planned row: DeepSpeed's config, and Megatron-LM's flags."""

from __future__ import annotations

from paci_schedule.core.schedules.registry import schedule
from paci_schedule.plan.search import Job, Row

__all__ = ["deepspeed_config", "megatron_flags", "pipeline_module"]


def deepspeed_config(job: Job, row: Row) -> dict[str, object]:
    """The DeepSpeed config of a row; `pipeline_module` has what DeepSpeed takes elsewhere."""
    config: dict[str, object] = {
        "train_batch_size": job.global_batch,
        "train_micro_batch_size_per_gpu": row.micro_batch_size,
        "gradient_accumulation_steps": row.accumulation,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": job.zero},
        "pipeline_schedule": row.schedule,
    }
    return config | ({"paci": {"prediction": job.prediction}} if _predicts(job, row) else {})


def pipeline_module(row: Row) -> dict[str, int]:
    """The arguments of DeepSpeed's PipelineModule that a row sets."""
    return {"num_stages": row.stages} | ({"activation_checkpoint_interval": 1} if row.recompute else {})


def megatron_flags(job: Job, row: Row) -> list[str]:
    """The Megatron-LM flags of a row, without those of the model itself."""
    flags = {
        "--pipeline-model-parallel-size": row.stages,
        "--micro-batch-size": row.micro_batch_size,
        "--global-batch-size": job.global_batch,
        "--seq-length": job.model.sequence_length,
        "--pipeline-schedule": row.schedule,
    }
    arguments = [each for flag, value in flags.items() for each in (flag, str(value))]
    arguments += ["--untie-embeddings-and-output-weights", "--bf16"]
    arguments += ["--paci-prediction", str(job.prediction)] * _predicts(job, row)
    arguments += ["--use-distributed-optimizer"] * job.zero
    recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    return arguments + recompute * row.recompute


def _predicts(job: Job, row: Row) -> bool:
    return "prediction" in schedule(row.schedule).options and job.prediction != "off"

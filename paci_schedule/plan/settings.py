"""The settings of a planned row, in the words of DeepSpeed and of Megatron-LM."""

from __future__ import annotations

from paci_schedule.plan.search import Job, Row

__all__ = ["deepspeed_config", "megatron_flags", "pipeline_module"]


def deepspeed_config(job: Job, row: Row) -> dict[str, object]:
    """The DeepSpeed JSON of a row; what else DeepSpeed must know is in `pipeline_module`."""
    return {
        "train_batch_size": job.global_batch,
        "train_micro_batch_size_per_gpu": row.micro_batch_size,
        "gradient_accumulation_steps": row.accumulation,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": job.zero},
        "pipeline_schedule": row.schedule,
    } | ({"paci": {"prediction": job.prediction}} if _predicts(job, row) else {})


def pipeline_module(row: Row) -> dict[str, int]:
    """The arguments of DeepSpeed's PipelineModule for a row."""
    return {"num_stages": row.stages} | ({"activation_checkpoint_interval": 1} if row.recompute else {})


def megatron_flags(job: Job, row: Row) -> list[str]:
    """The Megatron-LM flags of a row; the model's own are not among them."""
    flags = {
        "--pipeline-model-parallel-size": row.stages,
        "--micro-batch-size": row.micro_batch_size,
        "--global-batch-size": job.global_batch,
        "--seq-length": job.model.sequence_length,
        "--pipeline-schedule": row.schedule,
    }
    words = [word for flag, value in flags.items() for word in (flag, str(value))]
    words += ["--untie-embeddings-and-output-weights", "--bf16"]
    words += ["--rerun-mode", "disabled"] * (row.schedule == "paci")
    words += ["--paci-prediction", str(job.prediction)] * _predicts(job, row)
    words += ["--use-distributed-optimizer"] * job.zero
    recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    return words + recompute * row.recompute


def _predicts(job: Job, row: Row) -> bool:
    return row.schedule == "paci" and job.prediction != "off"

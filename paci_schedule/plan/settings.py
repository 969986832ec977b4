"""The settings of a planned row: DeepSpeed's config and partition, and Megatron-LM's flags.

What runs is what was planned: the same layers on every stage, and gradients that are summed in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from paci_schedule.core.schedules.registry import schedule
from paci_schedule.errors import ConfigError
from paci_schedule.plan.job import DATA_PARALLEL, Job, Row
from paci_schedule.plan.layers import ROLES, Layer

__all__ = ["deepspeed_config", "megatron_flags", "megatron_layout", "pipeline_module"]

_LETTERS: dict[str, str] = dict(zip(ROLES, "EtL", strict=True))


def deepspeed_config(job: Job, row: Row) -> dict[str, object]:
    """The DeepSpeed config of a row; `pipeline_module` has what DeepSpeed takes elsewhere.

    Raises:
        ConfigError: DeepSpeed cannot run the row.
    """
    if row.slices > 1:
        raise ConfigError(
            f"{row.slices} slices: a PipelineModule slices no layers; write sliced layers yourself, or plan without "
            "--tensor-parallel"
        )
    if not job.zero:
        raise ConfigError("zero=0: DeepSpeed sums bf16 gradients in fp32 with ZeRO stage 1 only; plan with --zero 1")
    options: dict[str, object] = {"prediction": job.prediction} if _predicts(job, row) else {}
    options |= {"extra_in_flight": list(row.extra_in_flight)} if row.extra_in_flight else {}
    return {
        "train_batch_size": job.global_batch,
        "train_micro_batch_size_per_gpu": row.micro_batch_size,
        "gradient_accumulation_steps": row.accumulation,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": job.zero},
        **({} if row.schedule == DATA_PARALLEL else {"pipeline_schedule": row.schedule}),
        **({"paci": options} if options else {}),
    }


def pipeline_module(row: Row) -> dict[str, object]:
    """The arguments of a `CutPipelineModule` that a row sets; DeepSpeed's own PipelineModule takes no bounds."""
    arguments: dict[str, object] = {"num_stages": row.stages, "partition_method": list(row.bounds)}
    return arguments | ({"activation_checkpoint_interval": 1} if row.recompute else {})


def megatron_flags(job: Job, row: Row) -> list[str]:
    """The Megatron-LM flags of a row, without those of the model itself.

    Raises:
        ConfigError: Megatron-LM cannot run the row.
    """
    if row.extra_in_flight:
        raise ConfigError(f"slack {list(row.extra_in_flight)} on the links: PACI takes it on DeepSpeed only")
    layers = job.model.layers_on(job.device, row.micro_batch_size, row.slices)
    layout = megatron_layout(layers, row.bounds)
    flags = {
        **({"--tensor-model-parallel-size": row.slices} if row.slices > 1 else {}),
        "--pipeline-model-parallel-size": row.stages,
        **({"--pipeline-model-parallel-layout": layout} if layout else {}),
        "--micro-batch-size": row.micro_batch_size,
        "--global-batch-size": job.global_batch,
        "--seq-length": job.model.sequence_length,
        **({} if row.schedule == DATA_PARALLEL else {"--pipeline-schedule": row.schedule}),
    }
    arguments = [each for flag, value in flags.items() for each in (flag, str(value))]
    arguments += ["--sequence-parallel"] * (row.slices > 1)
    arguments += ["--untie-embeddings-and-output-weights"] * (layers[-1].tied is None) + ["--bf16"]
    arguments += ["--paci-prediction", str(job.prediction)] * _predicts(job, row)
    arguments += ["--use-distributed-optimizer"] * job.zero + ["--overlap-grad-reduce"] * job.overlap
    recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    return arguments + recompute * row.recompute


def megatron_layout(layers: Sequence[Layer], bounds: Sequence[int]) -> str:
    """Megatron-LM's name of a partition: "Ett|ttt|ttL"; "" where Megatron-LM divides the layers so by itself.

    Raises:
        ConfigError: the layers are not an embedding, blocks and a head, so Megatron-LM has no name for them.
    """
    roles = [layer.role for layer in layers]
    if roles != ["embedding", *["block"] * (len(roles) - 2), "head"]:
        raise ConfigError(
            "the layers' roles are not an embedding, blocks and a head, so Megatron-LM's layout is not known; write "
            '"role" to each layer of the file'
        )
    stages = ["".join(_LETTERS[role] for role in roles[start:stop]) for start, stop in pairwise(bounds)]
    return "" if len({stage.count("t") for stage in stages}) == 1 else "|".join(stages)


def _predicts(job: Job, row: Row) -> bool:
    return row.stages > 1 and "prediction" in schedule(row.schedule).options and job.prediction != "off"

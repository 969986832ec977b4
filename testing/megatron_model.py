"""A small GPT from megatron-core's own parts, for jobs and for their reference; it knows nothing of `paci_schedule`."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from testing.megatron_cpu import shim
from testing.megatron_optimizers import build_optimizer, wrapped

__all__ = [
    "SEQUENCE",
    "GptJob",
    "build",
    "import_megatron",
    "mean_loss",
    "micro_batch",
    "set_up",
    "token_loss",
    "tokens_of",
]

VOCABULARY, SEQUENCE, HIDDEN = 24, 6, 16


@dataclass(frozen=True, kw_only=True)
class GptJob:
    """One training run.  The defaults are the plainest one."""

    stages: int = 2
    accumulation: int = 2
    calls: int = 5
    schedule: str = "paci"
    data_parallel: int = 1
    tensor_parallel: int = 1
    slices: int = 1
    """Without tensor parallelism: of how many slices' weights a layer is put together."""
    sequence_parallel: bool = False
    bf16: bool = False
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    align_grad_reduce: bool = False
    overlap_param_gather: bool = False
    per_token: bool = False
    """The loss is the mean over the tokens of an update, whose number changes from one micro-batch to the next."""
    deallocate: bool = True
    recompute: str | None = None
    optimizer: str = "adam"
    layer_wise: bool = False
    """Each replica updates some weights whole, and they are gathered."""
    lr: float = 0.01
    clip_grad: float = 0.0
    tied: bool = False
    count_zeros: bool = False
    accumulations: tuple[int, ...] = ()
    """Micro-batches of each call, where they change."""
    schedules: tuple[str, ...] = ()
    """The schedule of each call, where it changes."""
    of_each_call: int = 0
    """Micro-batches of the iterator that each call gets of its own; 0 for one iterator of all calls."""
    missing: int = 0
    """Micro-batches that the data has fewer than the calls need."""
    evaluate_after: tuple[int, ...] = ()
    """Calls after which the loop evaluates one batch of 2 micro-batches."""
    resume_after: int | None = None
    """A call after which everything is saved, built anew, and loaded."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Attributes to set on the config of the model or of its DDP once it is built, whatever they mean."""
    paci: dict[str, Any] = field(default_factory=dict)
    """Options of the schedule."""
    lengths: tuple[int, ...] = (SEQUENCE,)
    """Of the sequences of the micro-batches to train on, over and over again."""


def import_megatron() -> None:
    """Make Megatron importable in this process; without a GPU the CPU plays CUDA."""
    if dist.get_backend() == "nccl":
        torch.cuda.set_device(dist.get_rank())  # as Megatron-LM's initialize_megatron does
    else:
        shim.install()


def set_up(job: GptJob) -> None:
    """The process groups of a job."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(job.tensor_parallel, job.stages)
    model_parallel_cuda_manual_seed(7)


def micro_batch(
    index: int, replica: int, vocabulary: int = VOCABULARY, lengths: tuple[int, ...] = (SEQUENCE,)
) -> torch.Tensor:
    """Tokens of micro-batch `index` of a replica: int64[2, 1 + the length of its sequences]."""
    generator = torch.Generator().manual_seed(1000 * replica + index)
    return torch.randint(vocabulary, (2, SEQUENCE + 1), generator=generator)[:, : lengths[index % len(lengths)] + 1]


def build(job: GptJob, stage: int, stages: int, layers: int) -> tuple[Any, Any]:
    """The model of a stage, in DDP, and its optimizer, from megatron-core's own parts.

    Args:
        job: what is trained.
        stage: which part of the model to build.
        stages: how many parts it has.
        layers: in the whole of what megatron-core believes to be the pipeline.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    dtype = torch.bfloat16 if job.bf16 else torch.float32
    recompute = {"recompute_granularity": job.recompute} if job.recompute else {}
    if job.recompute == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        tensor_model_parallel_size=job.tensor_parallel,
        sequence_parallel=job.sequence_parallel,
        bf16=job.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        deallocate_pipeline_outputs=job.deallocate,
        calculate_per_token_loss=job.per_token,
        **recompute,
    )
    config.pipeline_schedule, config.paci = job.schedule, job.paci
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = LayerNorm
    model = (
        GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=[layer], layer_norm=LayerNorm),
            VOCABULARY,
            SEQUENCE,
            pre_process=stage == 0,
            post_process=stage == stages - 1,
            share_embeddings_and_output_weights=job.tied,
        )
        .cuda()
        .to(dtype)
    )
    tied = model.shared_embedding_or_output_weight() if job.tied else None
    if tied is not None:  # as in a real pipeline, where it has a bucket of its own, and one copy counts in the norm
        tied.shared_embedding = True
        tied.shared = stage > 0
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in model.named_parameters():
        split = getattr(parameter, "tensor_model_parallel", False)
        shape = list(parameter.shape)
        slices = [0]
        if split:
            slices = range(job.slices) if job.tensor_parallel == 1 else [tensor_rank]
            shape[parameter.partition_dim] //= len(slices)
        values = []
        for number in slices:
            seed = f"{'tied' if parameter is tied else f'{stage} {name}'} {number}"
            generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
            values.append(0.2 * torch.randn(shape, generator=generator))
        value = torch.cat(values, parameter.partition_dim if split else 0) if len(values) > 1 else values[0]
        parameter.data.copy_(1.0 + value if "norm" in name and name.endswith("weight") else value)
    model = wrapped(job, config, model)
    return model, build_optimizer(job, model, dtype)


class LayerNorm:
    """Makes what megatron-core's own without Transformer Engine makes, and does not refuse sequence parallelism."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.LayerNorm:
        norm = torch.nn.LayerNorm(hidden_size, eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def tokens_of(index: int, replica: int) -> int:
    """How many tokens of a micro-batch count under `token_loss`."""
    return int((micro_batch(index, replica)[:, 1:] % 3 > 0).sum())


def token_loss(
    labels: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The sum of the losses of the tokens that count, their number, and what is reported of it."""
    mask = labels % 3 > 0
    loss = (output.float() * mask).sum()
    return loss, mask.sum().int(), {"lm loss": loss.detach().clone()}


def mean_loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a micro-batch, and what is reported of it."""
    loss = output.float().mean()
    return loss, {"lm loss": loss.detach().clone()}

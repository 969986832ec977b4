"""Jobs of the Megatron tests: a small GPT from megatron-core's own parts, trained by a loop as Megatron-LM's is."""

from __future__ import annotations

import copy
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from integration_tests.collectives import recorded
from integration_tests.megatron_cpu import shim
from integration_tests.megatron_optimizers import build_optimizer, wrapped

__all__ = [
    "GptJob",
    "Trained",
    "build",
    "mean_loss",
    "micro_batch",
    "prepare",
    "refusals",
    "set_up",
    "train_all",
    "train_recorded",
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
    """Of each call, where it changes."""
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


@dataclass
class Trained:
    """What one rank saw.

    Attributes:
        losses: of each call, the micro-batches' (last stage).
        evaluations: losses of each evaluation (last stage).
        gradients: of each call, name -> gradient before the update.
        weights: name -> weight at the end.
        stats: the schedule's own, at the end; empty for the stock schedule.
        pulled: micro-batches taken from the training iterator, after each call.
        parked: micro-batches in flight, after each call.
        norms: the gradient norm that each optimizer.step() returned.
        zeros: the number of zero gradients that each returned.
        kept: whether each call left the weights that it found.
        collectives: name and global ranks of every collective of the last call and the update after it.
    """

    losses: list[list[float]] = field(default_factory=list)
    evaluations: list[list[float]] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    pulled: list[int] = field(default_factory=list)
    parked: list[int] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    zeros: list[float | None] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)
    collectives: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)


def prepare() -> None:
    """Make Megatron importable in this process, and register the schedule."""
    if dist.get_backend() == "nccl":
        torch.cuda.set_device(dist.get_rank())  # as Megatron-LM's initialize_megatron does
    else:
        shim.install()
    import paci_schedule

    load = torch.storage._load_from_bytes
    paci_schedule.register("megatron")
    torch.storage._load_from_bytes = load  # Megatron-LM's main puts its own there: who unpickles would import Megatron


def micro_batch(index: int, replica: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Tokens of micro-batch `index` of a replica: int64[2, SEQUENCE + 1]."""
    generator = torch.Generator().manual_seed(1000 * replica + index)
    return torch.randint(vocabulary, (2, SEQUENCE + 1), generator=generator)


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
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

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
        **recompute,
    )
    config.pipeline_schedule, config.paci = job.schedule, job.paci
    with mock.patch.object(WrappedTorchNorm, "__new__", _layer_norm):
        model = (
            GPTModel(
                config,
                get_gpt_layer_local_spec(),
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


def _layer_norm(_: type, config: Any, hidden_size: int, eps: float = 1e-5, **__: Any) -> torch.nn.LayerNorm:
    """As megatron-core's own without Transformer Engine, but for its refusal of sequence parallelism."""
    norm = torch.nn.LayerNorm(hidden_size, eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


def forward_step(data: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    """As pretrain_gpt.py's: the first and the last stage take a micro-batch, the others none."""
    from megatron.core import parallel_state

    tokens = labels = positions = None
    if parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage():
        batch = next(data).cuda()
        tokens, labels = batch[:, :-1], batch[:, 1:]
        positions = torch.arange(SEQUENCE, device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None, labels=labels), mean_loss


def mean_loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = output.float().mean()
    return loss, {"lm loss": loss.detach().clone()}


class Counted:
    """An iterator that counts what was taken from it."""

    def __init__(self, source: Iterator[torch.Tensor]) -> None:
        self.source, self.taken = source, 0

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> torch.Tensor:
        item = next(self.source)
        self.taken += 1
        return item


def _wired(job: GptJob) -> tuple[Any, Any]:
    """This rank's model and optimizer, and what its config must know of them."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    model, optimizer = build(job, parallel_state.get_pipeline_model_parallel_rank(), job.stages, job.stages)
    config = model.config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    for name, value in job.changes.items():
        setattr(model.ddp_config if hasattr(model.ddp_config, name) else config, name, value)
    if job.overlap_grad_reduce:
        config.no_sync_func = model.no_sync
        config.grad_sync_func = model.start_grad_sync if job.align_grad_reduce else None
    return model, optimizer


def train(job: GptJob, begins: Callable[[int], Any] = lambda call: None) -> Trained:
    """Train on this rank, with the process groups of the job set up.

    Args:
        job: what to train.
        begins: told of every call before it begins.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from paci_schedule.adapters.megatron import load_state_dict, pipeline_stats, state_dict

    replica = parallel_state.get_data_parallel_rank()
    model, optimizer = _wired(job)
    seen = Trained()
    accumulations = job.accumulations or (job.accumulation,) * job.calls
    count = sum(accumulations) + (job.stages if "train_iters" not in job.paci else 0)
    data = Counted(micro_batch(index, replica) for index in range(count - job.missing))
    validation = (micro_batch(10_000 + index, replica) for index in range(2 * len(job.evaluate_after)))
    shape = {"seq_length": SEQUENCE, "micro_batch_size": 2}
    for call, accumulation in enumerate(accumulations):
        begins(call)
        if job.schedules:
            model.config.pipeline_schedule = job.schedules[call]
        model.zero_grad_buffer()
        optimizer.zero_grad()
        found = [p.detach().clone() for p in model.parameters()]
        reduced = get_forward_backward_func()(
            forward_step_func=forward_step,
            model=[model],
            num_microbatches=accumulation,
            forward_only=False,
            data_iterator=itertools.islice(data, job.of_each_call) if job.of_each_call else data,
            **shape,
        )
        seen.losses.append([entry["lm loss"].item() for entry in reduced])
        seen.kept.append(all(map(torch.equal, found, model.parameters())))
        seen.gradients.append({name: p.main_grad.clone().cpu() for name, p in model.named_parameters()})
        ok, norm, zeros = optimizer.step()
        assert ok
        seen.norms.append(norm)
        seen.zeros.append(zeros)
        seen.pulled.append(data.taken)
        seen.parked.append(0 if job.schedule == "1f1b" or job.stages == 1 else pipeline_stats(model)["in_flight"])
        if call + 1 in job.evaluate_after:
            model.eval()
            with torch.no_grad():
                reduced = get_forward_backward_func()(
                    forward_step_func=forward_step,
                    data_iterator=validation,
                    model=[model],
                    num_microbatches=2,
                    forward_only=True,
                    **shape,
                )
            model.train()
            seen.evaluations.append([entry["lm loss"].item() for entry in reduced])
        if call + 1 == job.resume_after:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), state_dict(model)))
            model, optimizer = _wired(job)
            model.load_state_dict(saved[0])
            # By number: what the layer-wise optimizer takes, and any chain.
            optimizer.load_state_dict(dict(enumerate(saved[1])) if isinstance(saved[1], list) else saved[1])
            load_state_dict(model, saved[2])
    seen.weights = {name: p.detach().clone().cpu() for name, p in model.module.named_parameters()}
    if job.schedule == "paci" and job.stages > 1:
        seen.stats = pipeline_stats(model)
    return seen


def train_recorded(job: GptJob) -> Trained:
    """Train one job, with the collectives of its last call recorded."""
    prepare()
    set_up(job)
    begun: list[int] = []
    seen: list[tuple[int, str, tuple[int, ...]]] = []
    with recorded(lambda name, ranks: seen.append((len(begun), name, tuple(ranks)))):
        trained = train(job, begun.append)
    trained.collectives = [(name, ranks) for call, name, ranks in seen if call == job.calls]
    return trained


def train_all(jobs: list[GptJob]) -> list[Trained]:
    """Train several jobs, one after the other, on the same ranks."""
    prepare()
    results = []
    for job in jobs:
        set_up(job)
        results.append(train(job))
    return results


def refusals(jobs: list[GptJob]) -> list[str]:
    """Train several jobs that should be refused; returns what each was refused with, or "" if it was not."""
    prepare()
    from paci_schedule import PaciError

    said = []
    for job in jobs:
        set_up(job)
        try:
            train(job)
            said.append("")
        except PaciError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def set_up(job: GptJob) -> None:
    """The process groups of a job."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(job.tensor_parallel, job.stages)
    model_parallel_cuda_manual_seed(7)

"""What PACI refuses on Megatron before the first micro-batch, on all ranks together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from paci_schedule.adapters.megatron import bridge, groups, swift
from paci_schedule.adapters.megatron.job import Job
from paci_schedule.adapters.megatron.options import PaciOptions
from paci_schedule.adapters.megatron.prediction import reasons as prediction_reasons
from paci_schedule.adapters.megatron.settings import DDP, MODEL, OPTIMIZER
from paci_schedule.adapters.megatron.stage_local import chains, optimizers
from paci_schedule.adapters.megatron.ties import tied_embedding, unwrapped
from paci_schedule.adapters.refusal import launch_blocking, reasons, refuse_together

__all__ = ["check_supported"]


_WRAPPERS = (
    FP32Optimizer,
    Float16OptimizerWithFloat16Params,
    DistributedOptimizer,
    ChainedOptimizer,
    LayerWiseDistributedOptimizer,
)
"""What may be around the optimizers of a stage.  These step the stage's own weights, and each does so by itself."""


def check_supported(
    chunks: list[torch.nn.Module],
    config: Any,
    options: PaciOptions,
    job: Job | None,
    call: dict[str, Any],
    ranks: list[int],
) -> list[list[int]]:
    """Ask every rank of the job which pipeline it belongs to, and whether anything there cannot run under PACI.

    Args:
        chunks: the model.
        config: its ModelParallelConfig.
        options: of the schedule.
        job: which trains; None for a training loop of the user's own.
        call: the other arguments of the first call.
        ranks: this rank's pipeline, in stage order.

    Returns:
        the pipelines of the job, the same on every rank.

    Raises:
        UnsupportedError: on every rank, with every reason of any of them, so that none is left waiting.
    """
    found = chain(_reasons(chunks, config, options, job, call), prediction_reasons(chunks[0], config, options))
    found = found if job is None else map(job.worded, found)
    refuse_together(found, "'paci' cannot run this job; change what follows, or use '1f1b'")
    pipelines = [ranks] * dist.get_world_size()
    dist.all_gather_object(pipelines, ranks)
    return [list(pipeline) for pipeline in sorted(set(map(tuple, pipelines)))]


def _reasons(
    chunks: list[torch.nn.Module], config: Any, options: PaciOptions, job: Job | None, call: dict[str, Any]
) -> Iterator[str]:
    yield from reasons(MODEL, config)
    ddp = getattr(chunks[0], "ddp_config", None)
    if ddp is not None:
        yield from reasons(DDP, ddp)
    if job is not None:
        yield from job.reasons()
    else:
        yield from bridge.untried()
        yield from swift.untried()
    if len(chunks) > 1:
        yield f"a model of {len(chunks)} chunks (virtual pipeline stages): PACI runs one chunk on each rank"
    for kind in dict.fromkeys(map(type, [*chains(config), *optimizers(config)])):
        if not issubclass(kind, MegatronOptimizer):
            yield (
                f"the optimizer {kind.__name__} in no wrapper of Megatron's, which cannot step it: Megatron-LM's main "
                "leaves it so in the layer-wise optimizer (--use-distributed-optimizer) without --bf16; use --bf16"
            )
        elif kind not in _WRAPPERS:
            yield f"the optimizer {kind.__module__}.{kind.__name__}: not tried yet; use one that --optimizer names"
    settings = [optimizer.config for optimizer in optimizers(config) if type(optimizer) in _WRAPPERS]
    for first in settings[:1]:
        yield from reasons(OPTIMIZER, first)
    clips = any(each.clip_grad > 0 for each in settings)
    ties, embedding = tied_embedding(chunks[0])
    if clips and options.clip == "stage" and ties:
        yield (
            "'clip': 'stage' with --clip-grad and tied embeddings: stages would scale the gradients of their copies by "
            "different norms; use 'global', or --untie-embeddings-and-output-weights"
        )
    if ties and config.finalize_model_grads_func is None:
        yield (
            "tied embeddings in a training loop that does not set config.finalize_model_grads_func: the sum of their "
            "gradients would keep both stages waiting; set it to megatron.core.distributed.finalize_model_grads, and "
            "do not call that yourself"
        )
    layer_wise = any(isinstance(chain, LayerWiseDistributedOptimizer) for chain in chains(config))
    if layer_wise and getattr(ddp, "overlap_param_gather", False):
        yield "--overlap-param-gather with LayerWiseDistributedOptimizer: not tried yet; leave it off"
    if embedding is not None and not _is_at_an_end():
        yield (
            "--mtp-num-layers in a stage of its own, which has a third copy of the embedding: not tried yet; put these "
            "layers into the last stage (--pipeline-model-parallel-layout)"
        )
    if options.early_receives and getattr(job and job.args, "timing_log_level", 0):
        yield (
            "--timing-log-level with config.paci = {'early_receives': True}: its timers wait for the whole device, and "
            "so for receives posted before them; use 0, or leave the option out"
        )
    if options.early_receives:
        yield from launch_blocking("config.paci = {'early_receives': True}")
    if getattr(getattr(unwrapped(chunks[0]), "model_type", None), "name", "") == "encoder_and_decoder":
        yield "an encoder-decoder model: PACI runs decoder-only and encoder-only models"
    if call.get("adjust_tensor_shapes_fn") is not None:
        yield "adjust_tensor_shapes_fn (distillation): not tried yet"
    of_call = call.get("pg_collection")
    if of_call is not None and getattr(of_call, "pp", None) is not _pipeline():
        yield "a pg_collection with groups of its own: not tried yet; use parallel_state's"
    if not _is_stock(call.get("p2p_communicator")):
        yield "a p2p_communicator of your own, as between modules on other ranks: PACI has its own links; leave it out"
    if call.get("collect_non_loss_data"):
        yield "collect_non_loss_data in training: collect in evaluation"


def _is_stock(communicator: Any) -> bool:
    """Whether Megatron-core's schedule would make the same one for itself."""
    return communicator is None or (type(communicator) is P2PCommunicator and communicator.pp_group is _pipeline())


def _is_at_an_end() -> bool:
    stage, stages = parallel_state.get_pipeline_model_parallel_rank(), groups.pipeline().size()
    return stage in (0, stages - 1)


def _pipeline() -> object:
    return parallel_state.get_pipeline_model_parallel_group(check_initialized=False)

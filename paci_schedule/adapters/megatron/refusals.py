"""What PACI refuses on Megatron before the first micro-batch: the flag, the reason, the remedy."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
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

from paci_schedule.adapters.megatron.hooks import TESTED, loaded
from paci_schedule.adapters.megatron.job import REBOUND
from paci_schedule.adapters.megatron.options import PaciOptions
from paci_schedule.adapters.megatron.prediction import reasons as prediction_reasons
from paci_schedule.adapters.megatron.stage_local import chains, optimizers
from paci_schedule.adapters.megatron.ties import tied_embedding, unwrapped
from paci_schedule.adapters.refusal import Refusal, launch_blocking, reasons, refuse_together

__all__ = ["check_supported"]


def _flag(name: str, flag: str, why: str, allowed: Callable[[Any], bool] | None = None) -> Refusal:
    """A setting that is an attribute `name` of a config or of the arguments, which users set with `flag`."""
    refusal = Refusal(lambda settings: getattr(settings, name, None), f"{flag} ({name}={{value!r}})", why)
    return refusal if allowed is None else replace(refusal, allowed=allowed)


def _at_most_one(value: Any) -> bool:
    return value is None or value <= 1


_CONFIG = (
    _flag(
        "calculate_per_token_loss",
        "--calculate-per-token-loss",
        "the number of tokens of a batch is known when the last stage has finished it, and every stage would wait for "
        "that; leave it off",
    ),
    _flag(
        "fp16",
        "--fp16",
        "where a stage's gradients overflow, under a static --loss-scale too, it alone would skip the update, and "
        "stages and tied copies part; use --bf16",
    ),
    _flag(
        "virtual_pipeline_model_parallel_size",
        "--num-layers-per-virtual-pipeline-stage",
        "PACI has no bubble that interleaving could shrink; leave it off",
        _at_most_one,
    ),
    _flag("context_parallel_size", "--context-parallel-size", "not tried yet; use 1", _at_most_one),
    _flag("num_moe_experts", "--num-experts", "MoE reduces its metrics over the pipeline; use dense layers"),
    _flag("mtp_num_layers", "--mtp-num-layers", "it shares the embedding with the last stage; leave it off"),
    _flag(
        "cuda_graph_impl",
        "--cuda-graph-impl",
        "a captured graph reuses the buffers of micro-batches that are still in flight; use none",
        lambda value: value in (None, "none"),
    ),
    _flag("enable_cuda_graph", "--enable-cuda-graph", "as --cuda-graph-impl; leave it off"),
    _flag("external_cuda_graph", "--external-cuda-graph", "as --cuda-graph-impl; leave it off"),
    _flag("fp8", "--fp8-format", "not tried yet: scaling factors move under micro-batches in flight; use --bf16"),
    _flag("fp4", "--fp4-format", "as --fp8-format; use --bf16"),
    _flag(
        "defer_embedding_wgrad_compute",
        "--defer-embedding-wgrad-compute",
        "it fills the flush at the end of a batch, which is gone; leave it off",
    ),
    _flag("delay_wgrad_compute", "--delay-wgrad-compute", "it splits the backward; leave it off"),
    _flag(
        "num_microbatches_with_partial_activation_checkpoints",
        "config.num_microbatches_with_partial_activation_checkpoints",
        "it counts micro-batches within a flushed batch; use --recompute-granularity",
        lambda value: value is None,
    ),
    _flag("cpu_offloading", "--cpu-offloading-num-layers", "not tried yet; leave it off"),
    _flag("fine_grained_activation_offloading", "--fine-grained-activation-offloading", "not tried yet"),
    _flag("has_cond_embedder", "config.has_cond_embedder", "its gradients are summed over all stages; leave it off"),
    _flag("qk_clip", "--qk-clip", "it reduces over the model-parallel ranks in every iteration; leave it off"),
    _flag("log_max_attention_logit", "--log-max-attention-logit", "as --qk-clip; leave it off"),
    _flag(
        "dsa_indexer_loss_coeff",
        "--dsa-indexer-loss-coeff",
        "the indexer's loss is summed over the pipeline in every iteration; use 0",
    ),
    _flag(
        "gtp_weight_remat_size",
        "--tensor-parallel-num-weight-shards",
        "not tried yet: its ranks hold different weights of a stage; leave it off",
        _at_most_one,
    ),
)

_DDP = (
    _flag(
        "overlap_param_gather",
        "--overlap-param-gather",
        "a call may begin with a backward, before the weights are gathered; leave it off (--overlap-grad-reduce works)",
    ),
    _flag("use_megatron_fsdp", "--use-megatron-fsdp", "it frees weights that micro-batches in flight need; use DDP"),
    _flag(
        "num_distributed_optimizer_instances",
        "--num-distributed-optimizer-instances",
        "not tried yet; use 1",
        _at_most_one,
    ),
)

_OPTIMIZERS = (
    FP32Optimizer,
    Float16OptimizerWithFloat16Params,
    DistributedOptimizer,
    ChainedOptimizer,
    LayerWiseDistributedOptimizer,
)
"""What may be around the optimizers of a stage.  These step the stage's own weights, and each does so by itself."""

_OPTIMIZER = (
    _flag(
        "grad_norm_skip_threshold",
        "grad_norm_skip_threshold of the OptimizerConfig",
        "stages know each other's gradient norms late, so some would skip an update that others apply; leave it at inf",
        lambda value: value in (None, math.inf),
    ),
    _flag("optimizer_cpu_offload", "--optimizer-cpu-offload", "not tried yet; leave it off"),
)

_EVERY_ITERATION = "every rank waits for all the others in every iteration; "

_JOB = (
    _flag(
        "rerun_mode",
        "--rerun-mode",
        "an iteration cannot be re-run with micro-batches in flight; leave the flag out, or use disabled",
        lambda value: value in (None, "disabled"),
    ),
    _flag("rampup_batch_size", "--rampup-batch-size", "the number of micro-batches to an update must not change"),
    _flag("step_batch_size_schedule", "--step-batch-size-schedule", "as --rampup-batch-size"),
    _flag("decrease_batch_size_if_needed", "--decrease-batch-size-if-needed", "as --rampup-batch-size"),
    _flag("iterations_to_skip", "--iterations-to-skip", "the first stage has read ahead of the iteration to skip"),
    _flag("timing_log_level", "--timing-log-level", f"{_EVERY_ITERATION}use 0"),
    _flag("log_params_norm", "--log-params-norm", f"{_EVERY_ITERATION}leave it off"),
    _flag("exit_duration_in_mins", "--exit-duration-in-mins", f"{_EVERY_ITERATION}use --exit-interval"),
    _flag("exit_signal_handler", "--exit-signal-handler", f"{_EVERY_ITERATION}use --exit-interval"),
    _flag("log_straggler", "--log-straggler", f"{_EVERY_ITERATION}leave it off"),
    _flag("log_energy", "--log-energy", "every rank waits for all the others at every log line; leave it off"),
    _flag(
        "empty_unused_memory_level",
        "--empty-unused-memory-level",
        "it makes the host wait for the device, and for sums on their way, in every iteration; use 0",
    ),
    _flag(
        "optimizer_cuda_graph",
        "--optimizer-cuda-graph",
        "a captured update would replay the other stages' norms of that moment; leave it off",
    ),
    _flag(
        "inprocess_restart",
        "--inprocess-restart",
        "micro-batches in flight cannot be restarted; let torchrun start the job again from its checkpoint",
    ),
    _flag("adlr_autoresume", "--adlr-autoresume", "it ends the job between two planned ends; use --exit-interval"),
    _flag("save_dgrads_interval", "--save-dgrads-interval", "it would record micro-batches of two batches"),
    _flag("save_activations_interval", "--save-activations-interval", "as --save-dgrads-interval; leave it off"),
    _flag("perform_rl_step", "--perform-rl-step", "the data of an iteration is made from its weights"),
    _flag("sft", "--sft", "the statistics of packed sequences are summed over the world in every iteration"),
    _flag("vision_pretraining", "--vision-pretraining", "not tried yet"),
)


def check_supported(
    chunks: list[torch.nn.Module],
    config: Any,
    options: PaciOptions,
    args: Namespace | None,
    call: dict[str, Any],
    ranks: list[int],
) -> list[list[int]]:
    """Ask every rank of the job which pipeline it belongs to, and whether anything there cannot run under PACI.

    Args:
        chunks: the model.
        config: its ModelParallelConfig.
        options: of the schedule.
        args: Megatron-LM's arguments, if this is such a job.
        call: the other arguments of the first call.
        ranks: this rank's pipeline, in stage order.

    Returns:
        the pipelines of the job, the same on every rank.

    Raises:
        UnsupportedError: on every rank, with every reason of any of them, so that none is left waiting.
    """
    found = chain(_reasons(chunks, config, options, args, call), prediction_reasons(chunks[0], config, options))
    refuse_together(found, "'paci' cannot run this job; change what follows, or use '1f1b'")
    pipelines = [ranks] * dist.get_world_size()
    dist.all_gather_object(pipelines, ranks)
    return [list(pipeline) for pipeline in sorted(set(map(tuple, pipelines)))]


def _reasons(
    chunks: list[torch.nn.Module], config: Any, options: PaciOptions, args: Namespace | None, call: dict[str, Any]
) -> Iterator[str]:
    yield from reasons(_CONFIG, config)
    ddp = getattr(chunks[0], "ddp_config", None)
    if ddp is not None:
        yield from reasons(_DDP, ddp)
    if args is not None:
        yield from reasons(_JOB, args)
        for name in REBOUND:
            if not hasattr(loaded("megatron.training.training"), name):
                yield f"megatron.training.training.{name} is gone in this Megatron-LM: use a version in {TESTED}"
    if len(chunks) > 1:
        yield f"a model of {len(chunks)} chunks (virtual pipeline stages): PACI runs one chunk on each rank"
    for kind in dict.fromkeys(map(type, [*chains(config), *optimizers(config)])):
        if not issubclass(kind, MegatronOptimizer):
            yield (
                f"the optimizer {kind.__name__} in no wrapper of Megatron's, which cannot step it: Megatron-LM's main "
                "leaves it so in the layer-wise optimizer (--use-distributed-optimizer) without --bf16; use --bf16"
            )
        elif kind not in _OPTIMIZERS:
            yield f"the optimizer {kind.__module__}.{kind.__name__}: not tried yet; use one that --optimizer names"
    settings = [optimizer.config for optimizer in optimizers(config) if type(optimizer) in _OPTIMIZERS]
    for first in settings[:1]:
        yield from reasons(_OPTIMIZER, first)
    clips = any(each.clip_grad > 0 for each in settings)
    ties, _ = tied_embedding(chunks[0])
    if clips and options.clip == "stage" and ties:
        yield (
            "'clip': 'stage' with --clip-grad and tied embeddings: stages would scale the gradients of their copies by "
            "different norms; use 'global', or --untie-embeddings-and-output-weights"
        )
    if options.early_receives:
        yield from launch_blocking("config.paci = {'early_receives': True}")
    if getattr(getattr(unwrapped(chunks[0]), "model_type", None), "name", "") == "encoder_and_decoder":
        yield "an encoder-decoder model: PACI runs decoder-only and encoder-only models"
    if call.get("adjust_tensor_shapes_fn") is not None:
        yield "adjust_tensor_shapes_fn (distillation): not tried yet"
    groups = call.get("pg_collection")
    if groups is not None and getattr(groups, "pp", None) is not _pipeline():
        yield "a pg_collection with groups of its own: not tried yet; use parallel_state's"
    if call.get("collect_non_loss_data"):
        yield "collect_non_loss_data in training: collect in evaluation"


def _pipeline() -> object:
    return parallel_state.get_pipeline_model_parallel_group(check_initialized=False)

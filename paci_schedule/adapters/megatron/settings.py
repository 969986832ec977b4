"""The settings of Megatron that PACI does not run with: the flag, the reason, the remedy.

The arguments of Megatron-LM and the configs of Megatron-core have the same names for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from paci_schedule.adapters.refusal import Refusal

__all__ = ["DDP", "JOB", "MODEL", "OPTIMIZER", "flag"]


def flag(name: str, flag: str, why: str, allowed: Callable[[Any], bool] | None = None) -> Refusal:
    """A setting that is an attribute `name` of a config or of the arguments, which users set with `flag`."""
    refusal = Refusal(lambda settings: getattr(settings, name, None), f"{flag} ({name}={{value!r}})", why)
    return refusal if allowed is None else replace(refusal, allowed=allowed)


def _at_most_one(value: Any) -> bool:
    return value is None or value <= 1


MODEL = (
    flag(
        "fp16",
        "--fp16",
        "where a stage's gradients overflow, under a static --loss-scale too, it alone would skip the update, and "
        "stages and tied copies part; use --bf16",
    ),
    flag(
        "virtual_pipeline_model_parallel_size",
        "virtual pipeline stages, config.virtual_pipeline_model_parallel_size",
        "PACI has no bubble that interleaving could shrink; build one chunk for each stage",
        _at_most_one,
    ),
    flag(
        "cuda_graph_impl",
        "--cuda-graph-impl",
        "a captured graph reuses the buffers of micro-batches that are still in flight; use none",
        lambda value: value in (None, "none"),
    ),
    flag("enable_cuda_graph", "--enable-cuda-graph", "as --cuda-graph-impl; leave it off"),
    flag("external_cuda_graph", "--external-cuda-graph", "as --cuda-graph-impl; leave it off"),
    flag(
        "fp8",
        "--fp8-format",
        "not tried: Transformer Engine keeps weights in fp8, which a late backward reads while an update writes them, "
        "and only a GPU can tell whether their scaling factors fit then; use --bf16",
    ),
    flag("fp4", "--fp4-format", "as --fp8-format; use --bf16"),
    flag(
        "defer_embedding_wgrad_compute",
        "--defer-embedding-wgrad-compute",
        "it fills the flush at the end of a batch, which is gone; leave it off",
    ),
    flag(
        "overlap_moe_expert_parallel_comm",
        "--overlap-moe-expert-parallel-comm",
        "it computes a forward and a backward of interleaved chunks at once, and there are none; leave it off",
    ),
    flag("delay_wgrad_compute", "--delay-wgrad-compute", "as --overlap-moe-expert-parallel-comm; leave it off"),
    flag(
        "num_microbatches_with_partial_activation_checkpoints",
        "config.num_microbatches_with_partial_activation_checkpoints",
        "it counts micro-batches within a flushed batch; use --recompute-granularity",
        lambda value: value is None,
    ),
    flag("cpu_offloading", "--cpu-offloading-num-layers", "Megatron-core has it for one stage only; leave it off"),
    flag(
        "fine_grained_activation_offloading",
        "--fine-grained-activation-offloading",
        "it counts the micro-batches of each iteration anew, so those in flight would get each other's activations; "
        "leave it off, or use --recompute-granularity",
    ),
    flag("has_cond_embedder", "config.has_cond_embedder", "its gradients are summed over all stages; leave it off"),
    flag("qk_clip", "--qk-clip", "it reduces over the model-parallel ranks in every iteration; leave it off"),
    flag("log_max_attention_logit", "--log-max-attention-logit", "as --qk-clip; leave it off"),
    flag(
        "dsa_indexer_loss_coeff",
        "--dsa-indexer-loss-coeff",
        "the indexer's loss is summed over the pipeline in every iteration; use 0",
    ),
    flag(
        "gtp_weight_remat_size",
        "--tensor-parallel-num-weight-shards",
        "not tried yet: its ranks hold different weights of a stage; leave it off",
        _at_most_one,
    ),
)

DDP = (flag("use_megatron_fsdp", "--use-megatron-fsdp", "it frees weights that micro-batches in flight need; use DDP"),)

OPTIMIZER = (
    flag(
        "grad_norm_skip_threshold",
        "grad_norm_skip_threshold of the OptimizerConfig",
        "stages know each other's gradient norms late, so some would skip an update that others apply; leave it at inf",
        lambda value: value in (None, math.inf),
    ),
)

JOB = (
    flag(
        "rerun_mode",
        "--rerun-mode",
        "an iteration cannot be re-run with micro-batches in flight; leave the flag out, or use disabled",
        lambda value: value in (None, "disabled"),
    ),
    flag(
        "empty_unused_memory_level",
        "--empty-unused-memory-level",
        "it makes the host wait for the device, and for sums on their way, in every iteration; use 0",
    ),
    flag(
        "optimizer_cuda_graph",
        "--optimizer-cuda-graph",
        "a captured update would replay the other stages' norms of that moment; leave it off",
    ),
    flag("adlr_autoresume", "--adlr-autoresume", "it ends the job between two planned ends; use --exit-interval"),
    flag("save_dgrads_interval", "--save-dgrads-interval", "it would record micro-batches of two batches"),
    flag("save_activations_interval", "--save-activations-interval", "as --save-dgrads-interval; leave it off"),
    flag("perform_rl_step", "--perform-rl-step", "the data of an iteration is made from its weights"),
    flag("sft", "--sft", "the statistics of packed sequences are summed over the world in every iteration"),
    flag("vision_pretraining", "--vision-pretraining", "not tried yet"),
)

"""Megatron-LM's arguments, looked at as soon as they are parsed: before models, data and checkpoints are loaded."""

from __future__ import annotations

import logging
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from itertools import chain
from typing import Any

from paci_schedule.adapters.megatron.publishing import check_named
from paci_schedule.adapters.megatron.settings import DDP, JOB, MODEL, OPTIMIZER
from paci_schedule.adapters.probing import found_in
from paci_schedule.adapters.refusal import reasons
from paci_schedule.errors import CheckpointError

__all__ = ["argument_reasons", "look_at_arguments", "set_aside"]

logger = logging.getLogger(__name__)

_FOR_BUBBLES = {
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "microbatch_group_size_per_vp_stage": None,
    "overlap_param_gather_with_optimizer_step": False,
    "overlap_p2p_comm_warmup_flush": False,
    "defer_embedding_wgrad_compute": False,
    "overlap_moe_expert_parallel_comm": False,
    "delay_wgrad_compute": False,
    "ep_overlap_early_attn_memory_release": False,
}
"""Arguments that interleave a stage's chunks, overlap their work, or fill a flush with work, and the values that stand
for none."""

_SECONDS = 20  # that the other ranks leave rank 0 to write, before they end


def look_at_arguments() -> None:
    """Let Megatron-LM check its arguments for the schedule too, before its own checks of them.

    A job that cannot run then ends with one message, on rank 0.  Nothing happens where Megatron-LM has no such module.
    """
    if found_in("megatron.training.arguments") is None:
        return
    arguments = import_module("megatron.training.arguments")
    stock = arguments.validate_args

    def validate_args(args: Namespace, *rest: Any, **options: Any) -> Any:
        if args.pipeline_model_parallel_size > 1:
            set_aside(args)
            found = list(argument_reasons(args))
            if args.rank == 0:
                try:
                    check_named(args)
                except CheckpointError as error:
                    _end(str(error), args.rank)
            if found:
                _end("\n".join(["'paci' cannot run this job; change what follows, or use '1f1b':", *found]), args.rank)
        return stock(args, *rest, **options)

    module: Any
    for module in (arguments, import_module("megatron.training.initialize")):
        if getattr(module, "validate_args", None) is stock:
            module.validate_args = validate_args


def argument_reasons(args: Namespace) -> Iterator[str]:
    """Why a job with these arguments, as they are parsed, cannot run under PACI."""
    yield from chain.from_iterable(reasons(table, args) for table in (MODEL, DDP, OPTIMIZER, JOB))


def set_aside(args: Namespace) -> None:
    """Leave out what shrinks or fills a bubble, and changes no result: PACI has none.

    Every stage then runs its layers in one chunk, where the arguments ask for several (virtual pipeline stages).
    Checkpoints in Megatron's format torch_dist do not depend on the number of chunks.
    """
    changed = {name for name, none in _FOR_BUBBLES.items() if getattr(args, name, none) != none}
    for name in changed:
        setattr(args, name, _FOR_BUBBLES[name])
    layout = getattr(args, "pipeline_model_parallel_layout", None)
    if layout is not None:
        args.pipeline_model_parallel_layout = _joined(layout, args.pipeline_model_parallel_size)
        if args.pipeline_model_parallel_layout != layout:
            changed.add("pipeline_model_parallel_layout")
    if changed and args.rank == 0:
        logger.warning(
            "%s: set aside, for PACI has no bubble to shrink or to fill; every stage runs its layers as one chunk",
            ", ".join(f"--{name.replace('_', '-')}" for name in sorted(changed)),
        )


def _joined(layout: str, stages: int) -> str:
    """A layout of interleaved chunks as one of `stages` chunks with the same layers in the same order."""
    kinds = import_module("megatron.core.transformer.pipeline_parallel_layer_layout").PipelineParallelLayerLayout
    chunks = [[layer.name for layer in chunk] for chunk in kinds.parse_str_to_list(layout)]
    each, rest = divmod(len(chunks), stages)
    if each == 1 or rest:  # Megatron refuses a rest
        return layout
    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    joined = [chain.from_iterable(chunks[stage * each : (stage + 1) * each]) for stage in range(stages)]
    return "|".join("".join(letters[name] for name in stage) for stage in joined)


def _end(message: str, rank: int) -> None:
    """End the process.  Rank 0 says why; the others give it time, because a launcher ends all after the first."""
    if rank == 0:
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(_SECONDS)
    raise SystemExit(2)

"""Builds the stages of printed plans one after the other in this process, with ranks that talk to nobody.

    python -m integration_tests.planned FRAMEWORK MODEL.json PLAN.json...

Each PLAN.json is what `paci plan --json` printed for MODEL.json, a GPT-2 config.  For every plan a line of JSON is
printed: a list with what the framework built of each stage from the plan's settings.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

_BEGIN = dist.init_process_group  # before the stand-in for CUDA makes gloo of everything


def main() -> None:
    """Build every stage of each plan, for its first replica."""
    framework, model, *plans = sys.argv[1], *(json.loads(Path(name).read_text()) for name in sys.argv[2:])
    build = {"deepspeed": _deepspeed, "megatron": _megatron}[framework]
    for plan in plans:
        settings = plan["settings"][framework]
        row, found = settings["row"], []
        world = row["stages"] * row["replicas"]
        for stage in range(row["stages"]):
            rank = stage * row["replicas"]
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
            _BEGIN("fake", rank=rank, world_size=world, store=FakeStore())
            found.append(build(settings, model))
            dist.destroy_process_group()
        print(json.dumps(found), flush=True)


def _deepspeed(settings: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    import deepspeed
    from transformers import GPT2Config

    from launch.gpt2 import gpt2_layers, next_token_loss
    from paci_schedule.adapters.deepspeed import CutPipelineModule
    from paci_schedule.adapters.deepspeed.options import PaciOptions, read_schedule

    config = settings["settings"]
    schedule, options = read_schedule(config), PaciOptions.read(config)
    deepspeed.comm.comm.cdb = None
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    sizes = GPT2Config(**model)
    sizes._attn_implementation = "sdpa"
    module = CutPipelineModule(gpt2_layers(sizes), loss_fn=next_token_loss, **settings["pipeline_module"])
    plain = {key: value for key, value in config.items() if key not in ("pipeline_schedule", "paci")}
    adam = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
    engine, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=plain | adam)
    optimizer = engine.optimizer
    return {
        "layers": len(module.forward_funcs),
        "stage": engine.stage_id,
        "replicas": engine.dp_world_size,
        "batch": [
            engine.train_batch_size(),
            engine.train_micro_batch_size_per_gpu(),
            engine.gradient_accumulation_steps(),
        ],
        "recompute": module.activation_checkpoint_interval,
        "parameters": sum(one.numel() for one in module.parameters()),
        "weight_bytes": _nbytes(module.parameters()),
        "gradient_bytes": _nbytes(optimizer.fp32_groups_gradients_flat),
        "master_bytes": _nbytes(optimizer.fp32_groups_flat_partition),
        "schedule": schedule,
        "prediction": options.prediction,
        "slack": options.extra_in_flight,
    }


def _megatron(settings: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    from testing.megatron_cpu import shim

    shim.install()
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    parser = ArgumentParser()
    for flag in ("pipeline-model-parallel-size", "tensor-model-parallel-size", "recompute-num-layers"):
        parser.add_argument(f"--{flag}", type=int, default=1)
    for flag in ("pipeline-model-parallel-layout", "recompute-granularity", "recompute-method"):
        parser.add_argument(f"--{flag}")
    args, rest = parser.parse_known_args(settings["settings"])
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size, args.pipeline_model_parallel_size, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(7)
    given = {name: value for name, value in vars(args).items() if value is not None}
    if args.recompute_granularity is None:
        del given["recompute_num_layers"]
    config = TransformerConfig(
        num_layers=model["n_layer"],
        hidden_size=model["n_embd"],
        num_attention_heads=model["n_head"],
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        **given,
    )
    first, last = (end() for end in (parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage))
    built = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        model["vocab_size"],
        model["n_positions"],
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=False,
    ).bfloat16()  # as Megatron-LM does (Float16Module)
    return {
        "layers": len(built.decoder.layers) + first + last,
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "weight_bytes": _nbytes(built.parameters()),
        "rest": rest,
    }


def _nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


if __name__ == "__main__":
    main()

"""Train a GPT-2 on text with DeepSpeed's pipeline engine, by 1F1B with a flush or by PACI.

    torchrun --nproc-per-node 2 launch/train_gpt.py --model tiny --pipeline-schedule paci --output runs/first

What DeepSpeed decides (batch, accumulation, optimizer, precision, clipping, schedule) stands in a DeepSpeed JSON, by
default launch/configs/gpt_tiny.json; flags override what one tries out most.  Model, data and logging are flags.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed import PipelineEngine
from transformers import GPT2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import paci_schedule
from launch.batches import MicroBatches, split_stream
from launch.config import deepspeed_config
from launch.corpus import open_corpus
from launch.errors import LaunchError
from launch.gpt2 import SIZES, gpt2_config, gpt2_layers, gpt2_pipeline, next_token_loss
from launch.optimizer import optimizer_name, warm_up_cosine, weight_decay_groups
from launch.runlog import RunLog
from launch.tokens import tokenise
from launch.training import LoopOptions, Training
from paci_schedule import PaciError
from paci_schedule.adapters.deepspeed import balanced_cut
from paci_schedule.adapters.deepspeed.device import take_device
from paci_schedule.plan.partition import Partition
from paci_schedule.runtime.build_lock import watch_build_locks

_DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "gpt_tiny.json"


def main(arguments: list[str] | None = None) -> None:
    """Parse `arguments` (default: the command line) and train."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        _train(args)
    except (LaunchError, PaciError) as error:
        parser.exit(2, f"train_gpt: error: {error}\n")


def _train(args: argparse.Namespace) -> None:
    if "RANK" not in os.environ:
        raise LaunchError("no RANK in the environment: start with torchrun --nproc-per-node STAGES launch/train_gpt.py")
    watch_build_locks()
    take_device()
    world = int(os.environ["WORLD_SIZE"])
    stages = args.stages or world
    if world % stages:
        raise LaunchError(f"--stages {stages}: must divide the number of processes, {world}")
    config = deepspeed_config(
        args.deepspeed_config,
        pipeline_schedule=args.pipeline_schedule,
        prediction=args.prediction,
        prediction_reach=args.prediction_reach,
        micro_batch_size=args.micro_batch_size,
        accumulation=args.accumulation,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
    )
    schedule = config.get("pipeline_schedule", "1f1b")
    if schedule != "1f1b":  # the baseline runs on DeepSpeed as it comes
        paci_schedule.register("deepspeed")

    corpus = open_corpus(args.data, split=args.data_split, column=args.data_column)
    stream = tokenise(corpus, args.cache, tokenizer=args.tokenizer, vocabulary=args.vocabulary)
    training_text, held_out = split_stream(stream.ids, args.sequence_length)
    engine = _engine(args, config, stages, stream.vocabulary)
    batch = {
        "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
        "accumulation": engine.gradient_accumulation_steps(),
        "replicas": world // stages,
    }
    options = config.get("paci", {})
    facts = {
        "schedule": schedule,
        "prediction": options.get("prediction", "off") if schedule == "paci" else None,
        "prediction_reach": options.get("prediction_reach", 1.0),
        "stages": stages,
        **batch,
        "sequence_length": args.sequence_length,
        "updates": args.updates,
        "optimizer": optimizer_name(engine.basic_optimizer),
        "model": args.model,
        "parameters": _total_parameters(engine.module, batch["replicas"]),
        "cut": [int(bound) for bound in engine.module.parts],
        "data": corpus.name,
        "training_tokens": len(training_text) * args.sequence_length,
        "device": engine.device.type,
        "seed": args.seed,
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
    replica = engine.grid.get_data_parallel_id()
    log = RunLog(args.output if engine.is_last_stage() and replica == 0 else None)
    training = Training(
        engine,
        MicroBatches(training_text, seed=args.seed, replica=replica, **batch),
        MicroBatches(held_out, seed=args.seed, replica=replica, **batch),
        LoopOptions(
            updates=args.updates,
            log_every=args.log_every,
            validate_every=args.validate_every,
            validation_batches=args.validation_batches,
            save_every=args.save_every,
            checkpoints=args.output / "checkpoints",
            seed=args.seed,
        ),
        log,
    )
    start = 0
    if args.resume:
        start = training.resume()
    else:
        log.rewind(0)
        log.write("start", **facts)
    training.run(start)
    dist.destroy_process_group()


def _engine(args: argparse.Namespace, config: dict[str, Any], stages: int, vocabulary: int) -> PipelineEngine:
    if os.environ.get("DS_ACCELERATOR") == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    model = gpt2_config(
        args.model,
        vocabulary=vocabulary,
        sequence_length=args.sequence_length,
        dropout=args.dropout,
        blocks=args.blocks,
    )
    deepspeed.init_distributed()
    partition = _measured_cut(args, config, model, stages) if args.partition == "profile" else args.partition
    module = gpt2_pipeline(model, stages=stages, seed=args.seed, partition=partition)
    scheduler = None if "scheduler" in config else warm_up_cosine(args.updates, args.warm_up)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=weight_decay_groups(module), config=config, lr_scheduler=scheduler
    )
    return engine


def _measured_cut(args: argparse.Namespace, config: dict[str, Any], model: GPT2Config, stages: int) -> Partition:
    """The cut that balances the stages on this machine; kept with the run, for it is resumed with the same."""
    samples = config.get("train_micro_batch_size_per_gpu")
    if samples is None:
        raise LaunchError("--partition profile: needs train_micro_batch_size_per_gpu in the JSON or --micro-batch-size")
    file = args.output / "cut.json"
    if dist.get_rank() == 0 and not args.resume:
        file.unlink(missing_ok=True)
    ids = torch.randint(model.vocab_size, (samples, args.sequence_length))
    return balanced_cut(
        gpt2_layers(model),
        (ids, ids),
        num_stages=stages,
        loss_fn=next_token_loss,
        file=file,
        dtype=torch.bfloat16 if config.get("bf16", {}).get("enabled") else None,
    )


def _total_parameters(module: torch.nn.Module, replicas: int) -> int:
    counts: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, sum(parameter.numel() for parameter in module.parameters()))
    return sum(counts) // replicas


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_gpt", description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("DeepSpeed").add_argument
    add("--deepspeed-config", "--deepspeed_config", type=Path, default=_DEFAULT_CONFIG, metavar="JSON")
    add("--pipeline-schedule", choices=["1f1b", "paci"], help="instead of the JSON's pipeline_schedule")
    add("--prediction", choices=["off", "window", "every"], help="of the weights for PACI's stale forwards")
    add("--prediction-reach", type=float, help="how far along the expected update these weights lie, with every")
    add("--stages", type=_positive, help="pipeline stages; the other processes are data-parallel replicas [all]")
    add("--partition", default="parameters", help="parameters, uniform, type:REGEX, or profile: measured and balanced")
    add("--micro-batch-size", type=_positive, help="instead of the JSON's")
    add("--accumulation", type=_positive, help="micro-batches per update, instead of the JSON's")
    add("--learning-rate", type=float, help="peak, instead of the JSON's")
    add("--optimizer", choices=["adamw", "nadamw"], help="instead of the JSON's, with the JSON's lr, betas, eps, decay")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="tiny", help=f"{', '.join(SIZES)}, or a GPT-2 config.json")
    add("--blocks", type=_positive, help="number of transformer blocks, instead of the model's")
    add("--sequence-length", type=_positive, default=256)
    add("--dropout", type=float, default=0.0)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="stdlib", help="stdlib, a text file or glob, hub:NAME or hub:NAME:CONFIG")
    add("--data-split", default="train", help="of a hub dataset")
    add("--data-column", default="text", help="of a hub dataset")
    add("--tokenizer", default="byte", help="byte, bpe (trained on the data), hub:NAME or a tokenizer.json")
    add("--vocabulary", type=_positive, default=8192, help="of a trained bpe")
    add("--cache", type=Path, default=Path("runs/cache"), help="folder for tokenised text")
    add = parser.add_argument_group("run").add_argument
    add("--updates", type=_positive, default=500, help="length of the run")
    add("--warm-up", type=int, default=50, help="updates until the peak learning rate; a cosine to a tenth follows")
    add("--validate-every", type=int, default=100, help="updates; 0: at the end only")
    add("--validation-batches", type=_positive, default=10)
    add("--save-every", type=int, default=0, help="updates; 0: no checkpoints")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    add("--log-every", type=_positive, default=10, help="updates")
    add("--output", type=Path, default=Path("runs/train_gpt"), help="folder of log and checkpoints")
    add("--seed", type=int, default=1234)
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


if __name__ == "__main__":
    main()

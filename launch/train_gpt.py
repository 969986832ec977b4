"""Train a GPT-2 on text with DeepSpeed's pipeline engine, by 1F1B with a flush or by PACI.

    torchrun --nproc-per-node 2 launch/train_gpt.py --model tiny --pipeline-schedule paci --output runs/first

What DeepSpeed decides (batch, accumulation, optimizer, precision, clipping, schedule) stands in a DeepSpeed JSON, by
default launch/configs/gpt_tiny.json; flags override what one tries out most.  Model, data and logging are flags.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from transformers import GPT2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.batches import MicroBatches, Sequences, split_stream
from launch.corpus import open_corpus
from launch.gpt2 import SIZES, gpt2_config, gpt2_layers, gpt2_pipeline, next_token_loss
from launch.optimizer import warm_up_cosine, weight_decay_groups
from launch.runlog import RunLog
from launch.tokens import tokenise
from launch.training import LoopOptions, Training
from paci_schedule.adapters.deepspeed import balanced_cut
from paci_schedule.balance import Cut

_CONFIGS = Path(__file__).resolve().parent / "configs"


def main(arguments: list[str] | None = None) -> None:
    """Parse `arguments` (default: the command line) and train."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        _train(args)
    except ValueError as error:
        parser.exit(2, f"train_gpt: error: {error}\n")


def _train(args: argparse.Namespace) -> None:
    if "RANK" not in os.environ:
        raise ValueError("no RANK in the environment: start with torchrun --nproc-per-node STAGES launch/train_gpt.py")
    world = int(os.environ["WORLD_SIZE"])
    stages = args.stages or world
    if world % stages:
        raise ValueError(f"--stages {stages}: must divide the number of processes, {world}")
    config = _deepspeed_config(args)
    schedule = config.get("pipeline_schedule", "1f1b")
    if schedule != "1f1b":  # the baseline runs on DeepSpeed as it comes
        import paci_schedule

        paci_schedule.register()

    corpus = open_corpus(args.data, split=args.data_split, column=args.data_column)
    stream = tokenise(corpus, args.cache, tokenizer=args.tokenizer, vocabulary=args.vocabulary)
    training_text, held_out = split_stream(stream.ids, args.sequence_length)

    if os.environ.get("DS_ACCELERATOR") == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    deepspeed.init_distributed()
    model = gpt2_config(
        args.model,
        vocabulary=stream.vocabulary,
        sequence_length=args.sequence_length,
        dropout=args.dropout,
        blocks=args.blocks,
    )
    partition = args.partition
    if partition == "profile":
        partition = _profiled_cut(args, model, stages, config, training_text)
    module = gpt2_pipeline(model, stages=stages, seed=args.seed, partition=partition)
    own_schedule = None if "scheduler" in config else warm_up_cosine(args.updates, args.warm_up)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=weight_decay_groups(module), config=config, lr_scheduler=own_schedule
    )
    batch = {
        "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
        "accumulation": engine.gradient_accumulation_steps(),
        "replicas": world // stages,
        "replica": engine.grid.get_data_parallel_id(),
    }
    logs = engine.is_last_stage() and batch["replica"] == 0
    log = RunLog(args.output if logs else None)
    training = Training(
        engine,
        MicroBatches(training_text, seed=args.seed, **batch),
        MicroBatches(held_out, **batch),
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
    parameters = _total_parameters(module, replicas=world // stages)
    start = 0
    if args.resume:
        start = training.resume()
    else:
        log.rewind(0)
        log.write(
            "start",
            schedule=schedule,
            stages=stages,
            replicas=batch["replicas"],
            accumulation=batch["accumulation"],
            micro_batch_size=batch["micro_batch_size"],
            sequence_length=args.sequence_length,
            updates=args.updates,
            optimizer=type(engine.basic_optimizer).__name__,
            model=args.model,
            parameters=parameters,
            data=corpus.name,
            train_tokens=len(training_text) * args.sequence_length,
            device=engine.device.type,
            seed=args.seed,
            torch=torch.__version__,
            deepspeed=deepspeed.__version__,
        )
    training.run(start)
    dist.destroy_process_group()


def _profiled_cut(
    args: argparse.Namespace, model: GPT2Config, stages: int, config: dict[str, Any], text: Sequences
) -> Cut:
    """The cut with the fastest slowest stage, measured; that of the run before if it is resumed."""
    file = args.output / "cut.json"
    if not args.resume and dist.get_rank() == 0:
        file.unlink(missing_ok=True)
    samples = config.get("train_micro_batch_size_per_gpu", 1)
    cut = balanced_cut(
        gpt2_layers(model),
        next(MicroBatches(text, micro_batch_size=samples, accumulation=1).from_batch(0)),
        num_stages=stages,
        loss_fn=next_token_loss,
        dtype=torch.bfloat16 if config.get("bf16", {}).get("enabled") else None,
        file=file,
    )
    if dist.get_rank() == 0:
        print(cut, flush=True)
    return cut


def _deepspeed_config(args: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed JSON with the flags that were given put over it."""
    path = args.deepspeed_config
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--deepspeed-config {str(path)!r}: cannot be read as JSON ({error})") from None
    if args.pipeline_schedule:
        config["pipeline_schedule"] = args.pipeline_schedule
    if args.micro_batch_size:
        config["train_micro_batch_size_per_gpu"] = args.micro_batch_size
    if args.accumulation:
        config["gradient_accumulation_steps"] = args.accumulation
    if args.micro_batch_size or args.accumulation:
        config.pop("train_batch_size", None)
    if args.optimizer == "nadamw":  # its look-ahead in the momentum helps delayed gradients
        given = config["optimizer"]["params"]
        kept = {name: given[name] for name in ("lr", "betas", "eps", "weight_decay") if name in given}
        config["optimizer"] = {"type": "NAdam", "params": kept | {"decoupled_weight_decay": True}}
        config["zero_allow_untested_optimizer"] = True
    if args.learning_rate:
        config["optimizer"]["params"]["lr"] = args.learning_rate
    return config


def _total_parameters(module: torch.nn.Module, replicas: int) -> int:
    counts: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, sum(parameter.numel() for parameter in module.parameters()))
    return sum(counts) // replicas


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_gpt", description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("DeepSpeed").add_argument
    add("--deepspeed-config", type=Path, default=_CONFIGS / "gpt_tiny.json", metavar="JSON")
    add("--pipeline-schedule", choices=["1f1b", "paci"], help="instead of the JSON's pipeline_schedule")
    add("--stages", type=_positive, help="pipeline stages; the other processes are data-parallel replicas [all]")
    add("--partition", default="parameters", help="of layers into stages: parameters, uniform, type:REGEX, profile")
    add("--micro-batch-size", type=_positive, help="instead of the JSON's")
    add("--accumulation", type=_positive, help="micro-batches per update, instead of the JSON's")
    add("--learning-rate", type=float, help="peak, instead of the JSON's")
    add("--optimizer", choices=["nadamw"], help="instead of the JSON's; its other parameters are kept")
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

"""Run a training script with the schedule registered, without a change to the script.

torchrun --nproc-per-node 8 -m paci_schedule.launch train.py --deepspeed_config ds_config.json
deepspeed --module paci_schedule.launch train.py --deepspeed_config ds_config.json
torchrun --nproc-per-node 8 -m paci_schedule.launch pretrain_gpt.py --pipeline-schedule paci --num-layers 24 ...

A script that is given --deepspeed... is a DeepSpeed job, and only DeepSpeed is registered with.  DeepSpeed reads the
schedule from its config.  A script that names megatron.bridge.training or megatron.bridge.recipes is a Megatron-Bridge
job.  Any other script beside which, or on PYTHONPATH, the folder megatron/training of Megatron-LM is found is a
Megatron-LM job.  For these two kinds of job only Megatron-core is registered with.  Neither has a flag for a schedule,
so the launcher takes the following flags out of the script's arguments.  To those of a Megatron-LM job it adds
--rerun-mode disabled with another schedule than 1f1b, unless the user chose a mode.  A script that names megatron.core
itself, and not DeepSpeed, is a training loop of one's own: it may have the last two flags too.  For every other script
the launcher registers with what is installed.

    --pipeline-schedule {1f1b,paci}    [1f1b]
    --paci-clip {global,stage}         whose norm --clip-grad limits [global]
    --paci-timeout SECONDS             that a neighbouring stage may take to answer [600]
    --paci-prediction WHEN             stale forwards run on predicted weights: window, every, or a number k [off]
    --paci-prediction-reach REACH      how far along the expected update these lie, with "every" [1]
    --paci-flush-warmup-steps UPDATES  that run 1F1B at the start of training [0]
    --paci-early-receives              post the receives of gradients one op earlier, for stages that differ
    --paci-on-nonfinite {ignore,raise,skip}  what is done where something that a stage makes is not finite [ignore]
    --paci-loss-spike RISE             of an update's loss, after which updates run 1F1B
    --paci-loss-spike-flush-steps UPDATES  that do so [100]
    --paci-record FOLDER               write the ops of every rank, with their times, to this folder, for `paci trace`
    --paci-train-iters CALLS           after which training ends, in a training loop of one's own
    --paci-drain-interval CALLS        after which the pipe is empty each time, likewise
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import runpy
import sys
from functools import partial
from typing import Any

from paci_schedule import ConfigError, register
from paci_schedule.adapters.frameworks import exists
from paci_schedule.adapters.megatron.options import PaciOptions
from paci_schedule.adapters.options import Options, flag_options, parse
from paci_schedule.adapters.probing import found_in
from paci_schedule.adapters.ranks import is_rank_0

__all__ = ["main", "our_flags", "without_reruns"]

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Register, then run the script named first in `argv` as ``__main__`` with the rest as its arguments.

    Raises:
        ConfigError: there is no such script, or a flag of ours has a value that the rules do not allow.
    """
    arguments = sys.argv[1:] if argv is None else argv
    # The deepspeed launcher puts --local_rank in front of the module's arguments; the script expects it among its own.
    leading = [argument for argument in arguments[:1] if argument.startswith("--local_rank")]
    script, *rest = arguments[len(leading) :] or [""]
    if not os.path.isfile(script):
        raise ConfigError(
            f"{script!r} is not a file: write the training script right after the module, "
            "for example: torchrun -m paci_schedule.launch train.py --its --arguments"
        )
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # a checkout beside the script goes before what is installed
    kind = _kind_of(script, rest)
    framework = {"DeepSpeed": "deepspeed", "": ""}.get(kind, "megatron")
    ours, given = argparse.Namespace(), rest
    if framework == "megatron":
        ours, rest = our_flags(PaciOptions if kind == "own loop" else Options).parse_known_args(rest)
    is_switched = getattr(ours, "pipeline_schedule", "1f1b") != "1f1b"
    if kind == "Megatron-LM" and is_switched:
        rest += without_reruns(rest)
    sys.argv = [script, *leading, *rest]
    if kind == "Megatron-Bridge":
        os.execvpe = partial(_started_again, os.execvpe, os.path.realpath(script), given)
    # Here, so that a word about a wrong argument does not wait for torch.
    from paci_schedule.runtime.build_lock import watch_build_locks
    from paci_schedule.runtime.shared_gpu import share_gpus

    watch_build_locks()
    share_gpus()
    register(*[framework] if framework else [])
    if vars(ours):
        from paci_schedule.adapters import megatron

        options = {name.removeprefix("paci_"): value for name, value in vars(ours).items() if name.startswith("paci_")}
        megatron.register(getattr(ours, "pipeline_schedule", None), options)
        if kind == "Megatron-LM" and is_switched:
            megatron.look_at_arguments()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            sys.last_value = end  # as Python leaves other errors for what runs at the exit: no rank waits for others
        raise


def _kind_of(script: str, arguments: list[str]) -> str:
    """What the script is; "" where its arguments, its text and what lies beside it do not tell.

    Megatron-LM has a folder megatron/training, which Megatron-Bridge uses too.  Projects that DeepSpeed drives have a
    megatron/training.py.
    """
    if any(word.startswith("--deepspeed") for word in arguments):
        return "DeepSpeed"
    with open(script, encoding="utf-8", errors="replace") as file:
        text = file.read()
    if re.search(r"megatron\.bridge\.(training|recipes|diffusion)\b", text):  # and not only its conversions
        return "Megatron-Bridge"
    if os.path.isdir(found_in("megatron.training") or ""):
        return "Megatron-LM"
    is_own_loop = "megatron.core" in text and "deepspeed" not in text and exists("megatron.core")
    return "own loop" if is_own_loop else ""


def _started_again(stock: Any, script: str, given: list[str], file: Any, args: Any, env: Any) -> None:
    """Stands in for `os.execvpe`, by which Megatron-Bridge's run_recipe.py starts itself again in the environment of
    a recipe: the launcher starts it then, too.

    Args:
        stock: Python's own.
        script: the real path of the training script.
        given: its arguments, ours among them.
        file, args, env: as of `os.execvpe`.
    """
    if len(args) > 1 and os.path.realpath(args[1]) == script:
        args = [args[0], "-m", "paci_schedule.launch", args[1], *given]
    stock(file, args, env)


def without_reruns(arguments: list[str]) -> list[str]:
    """The arguments that keep Megatron-LM from re-running iterations, unless the user chose a mode of re-runs.

    Its default, validate_results, cannot repeat an iteration whose micro-batches are in flight.
    """
    if any(word.partition("=")[0] == "--rerun-mode" for word in arguments):
        return []
    if is_rank_0():
        logger.warning("--rerun-mode disabled is set, since an iteration cannot be re-run with micro-batches in flight")
    return ["--rerun-mode", "disabled"]


def our_flags(options: type[Options]) -> argparse.ArgumentParser:
    """What reads the flags of the schedule, those of these options among them, out of a command line."""
    flags = argparse.ArgumentParser(
        "paci_schedule.launch", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    flags.add_argument("--pipeline-schedule")
    for name, value_of in flag_options(options).items():
        flag = f"--paci-{name.replace('_', '-')}"
        if value_of is bool:
            flags.add_argument(flag, action="store_true", default=argparse.SUPPRESS)
        else:
            flags.add_argument(flag, type=partial(_value, options, name))
    return flags


def _value(options: type[Options], name: str, text: str) -> Any:
    """The value of a flag; argparse shows the error and names the flag."""
    try:
        return parse(options, name, text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    main()

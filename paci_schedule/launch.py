"""Run a training script with the schedule registered, without a change to the script.

torchrun --nproc-per-node 8 -m paci_schedule.launch train.py --deepspeed_config ds_config.json
deepspeed --module paci_schedule.launch train.py --deepspeed_config ds_config.json
torchrun --nproc-per-node 8 -m paci_schedule.launch pretrain_gpt.py --pipeline-schedule paci --num-layers 24 ...

A script that is given --deepspeed... is a DeepSpeed job, and only DeepSpeed is registered with.  DeepSpeed reads the
schedule from its config.  Any other script beside which, or on PYTHONPATH, the folder megatron/training of Megatron-LM
is found is a Megatron-LM job, and only Megatron-core is registered with.  Megatron-LM has no flag for a schedule, so
the launcher takes the following flags out of the script's arguments.  With another schedule than 1f1b it adds
--rerun-mode disabled, unless the user chose a mode.  For every other script it registers with what is installed.

    --pipeline-schedule {1f1b,paci}    [1f1b]
    --paci-clip {global,stage}         whose norm --clip-grad limits [global]
    --paci-timeout SECONDS             that a neighbouring stage may take to answer [600]
    --paci-prediction WHEN             stale forwards run on predicted weights: window, every, or a number k [off]
    --paci-prediction-reach REACH      how far along the expected update these lie, with "every" [1]
    --paci-flush-warmup-steps UPDATES  that run 1F1B at the start of training [0]
    --paci-early-receives              post the receives of gradients one op earlier, for stages that differ
    --paci-record FOLDER               write the ops of every rank, with their times, to this folder, for `paci trace`
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import sys
from functools import partial
from typing import Any

from paci_schedule import ConfigError, register
from paci_schedule.adapters.options import Options, flag_options, parse
from paci_schedule.adapters.probing import found_in

__all__ = ["main", "without_reruns"]

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
    framework = _framework_of(rest)
    ours, rest = _our_flags().parse_known_args(rest) if framework == "megatron" else (argparse.Namespace(), rest)
    if getattr(ours, "pipeline_schedule", "1f1b") != "1f1b":
        rest += without_reruns(rest)
    sys.argv = [script, *leading, *rest]
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
        if getattr(ours, "pipeline_schedule", "1f1b") != "1f1b":
            megatron.look_at_arguments()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            sys.last_value = end  # as Python leaves other errors for what runs at the exit: no rank waits for others
        raise


def _framework_of(arguments: list[str]) -> str:
    """Which framework the script trains with; "" where its arguments and what lies beside it do not tell.

    Megatron-LM has a folder megatron/training.  Projects that DeepSpeed drives have a megatron/training.py.
    """
    if any(word.startswith("--deepspeed") for word in arguments):
        return "deepspeed"
    return "megatron" if os.path.isdir(found_in("megatron.training") or "") else ""


def without_reruns(arguments: list[str]) -> list[str]:
    """The arguments that keep Megatron-LM from re-running iterations, unless the user chose a mode of re-runs.

    Its default, validate_results, cannot repeat an iteration whose micro-batches are in flight.
    """
    if any(word.partition("=")[0] == "--rerun-mode" for word in arguments):
        return []
    if os.environ.get("RANK", "0") == "0":
        logger.warning("--rerun-mode disabled is set, since an iteration cannot be re-run with micro-batches in flight")
    return ["--rerun-mode", "disabled"]


def _our_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        "paci_schedule.launch", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    flags.add_argument("--pipeline-schedule")
    for name, value_of in flag_options(Options).items():
        flag = f"--paci-{name.replace('_', '-')}"
        if value_of is bool:
            flags.add_argument(flag, action="store_true", default=argparse.SUPPRESS)
        else:
            flags.add_argument(flag, type=partial(_value, name))
    return flags


def _value(name: str, text: str) -> Any:
    """The value of a flag; argparse shows the error and names the flag."""
    try:
        return parse(Options, name, text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    main()

"""Run a training script with the schedule registered, without a change to the script.

torchrun --nproc-per-node 8 -m paci_schedule.launch train.py --deepspeed_config ds_config.json
deepspeed --module paci_schedule.launch train.py --deepspeed_config ds_config.json
"""

from __future__ import annotations

import os
import runpy
import sys

from paci_schedule import ConfigError, register

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Register, then run the script named first in `argv` as ``__main__`` with the rest as its arguments."""
    arguments = sys.argv[1:] if argv is None else argv
    # The deepspeed launcher puts --local_rank in front of the module's arguments; the script expects it among its own.
    leading = [argument for argument in arguments[:1] if argument.startswith("--local_rank")]
    script, *rest = arguments[len(leading) :] or [""]
    if not os.path.isfile(script):
        raise ConfigError(
            f"{script!r} is not a file: write the training script right after the module, "
            "for example: torchrun -m paci_schedule.launch train.py --its --arguments"
        )
    # Here, so that a word about a wrong argument does not wait for torch.
    from paci_schedule.runtime.staged import share_gpus

    share_gpus()
    register()
    sys.argv = [script, *leading, *rest]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()

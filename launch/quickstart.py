"""The quick start: train the same small GPT by 1F1B with a flush and by PACI, and compare.

As many stages as there are GPUs; two stages on the CPU where there are fewer than two.  Same seed, data and number of
updates.  The accumulation equals the number of stages P, so the drift is at most 1 and the ideal speed-up (2P - 1) / P.
The second run differs from the first only by the schedule; the third also predicts the weights for forwards that would
run on older ones, against the delay of the gradients.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import compare
from launch.errors import LaunchError
from launch.kernels import build_kernels

_TRAIN = Path(__file__).resolve().parent / "train_gpt.py"
_RUNS = {
    "1f1b": ["--pipeline-schedule", "1f1b"],
    "paci": ["--pipeline-schedule", "paci"],
    "paci-prediction": ["--pipeline-schedule", "paci", "--prediction", "every", "--prediction-reach", "1.5"],
}


def main(arguments: list[str] | None = None) -> None:
    """Train, then print the table and where the plot is."""
    parser = argparse.ArgumentParser(
        prog="quickstart",
        description=__doc__.split("\n\n")[0],
        epilog="Other flags are passed on to train_gpt.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder of the runs and the plot")
    parser.add_argument("--updates", type=int, default=540, help="of each run")
    args, passed_on = parser.parse_known_args(arguments)

    gpus = torch.cuda.device_count()
    stages, model, device = (gpus, "small", "GPUs") if gpus > 1 else (2, "tiny", "the CPU")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(stages)]
    shared = ["--model", model, "--blocks", str(2 * stages), "--accumulation", str(stages), "--sequence-length", "128"]
    shared += ["--updates", str(args.updates), "--validation-batches", "16"]
    if gpus < 2:
        try:
            build_kernels()
        except LaunchError as error:
            sys.exit(f"quickstart: {error}")
    for run, own in _RUNS.items():
        print(f"\n{' '.join(own)}: {args.updates} updates, {stages} stages on {device}", flush=True)
        command = [*launcher, str(_TRAIN), *shared, *own, "--output", str(args.output / run), *passed_on]
        if subprocess.run(command, env=_environment(gpus), check=False).returncode:
            sys.exit(f"quickstart: the run {' '.join(own)} failed, see above")
    compare.main([str(args.output / run) for run in _RUNS])


def _environment(gpus: int) -> dict[str, str]:
    """One thread a stage on the CPU: two stages then share two cores without getting in each other's way."""
    if gpus > 1:
        return {**os.environ}
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()

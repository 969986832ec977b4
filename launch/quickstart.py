"""The quick start: train the same small GPT twice, by 1F1B with a flush and by PACI, and compare.

As many stages as there are GPUs; two stages on the CPU where there are fewer than two.  Same seed, data and number of
updates; the accumulation equals the number of stages, so the drift is at most 1 and the ideal speed-up (2P - 1) / P.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import compare

_TRAIN = Path(__file__).resolve().parent / "train_gpt.py"


def main(arguments: list[str] | None = None) -> None:
    """Train twice, then print the table and where the plot is."""
    parser = argparse.ArgumentParser(
        prog="quickstart",
        description=__doc__.split("\n\n")[0],
        epilog="Other flags are passed on to train_gpt.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder of both runs and the plot")
    parser.add_argument("--updates", type=int, default=600, help="of each run")
    args, passed_on = parser.parse_known_args(arguments)

    gpus = _gpus()
    stages, model, device = (gpus, "small", "GPUs") if gpus > 1 else (2, "tiny", "the CPU")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(stages)]
    shape = ["--model", model, "--blocks", str(2 * stages), "--accumulation", str(stages)]
    folders = []
    for schedule in ("1f1b", "paci"):
        print(f"\nTraining with --pipeline-schedule {schedule}, {stages} stages on {device}", flush=True)
        folders.append(str(args.output / schedule))
        own = ["--pipeline-schedule", schedule, "--output", folders[-1], "--updates", str(args.updates)]
        command = [*launcher, str(_TRAIN), *shape, *own, *passed_on]
        if subprocess.run(command, env=_environment(gpus), check=False).returncode:
            sys.exit(f"quickstart: training with --pipeline-schedule {schedule} failed, see above")
    compare.main(folders)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _environment(gpus: int) -> dict[str, str]:
    """One thread a stage on the CPU: two stages then share two cores without getting in each other's way."""
    if gpus > 1:
        return {**os.environ}
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()

"""Ranks that share the GPU through host memory (`runtime.staged`), as `paci_schedule.launch` sets them up."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.place import Place

__all__ = ["run"]

_ROOT = Path(__file__).parents[2]
_SCRIPT = """
import torch
from integration_tests import deepspeed_job, oracle
from integration_tests.jobs import Job

job = Job(stages=2, accumulation=3, script=("train x4", "drain", "train x3", "drain"), optimizer="sgd")
result = deepspeed_job.train(job)
expected = oracle.run(job)
difference = max(
    (moment["weights"][name].float() - value.float()).abs().max().item()
    for moment, truth in zip(result["moments"], expected, strict=True)
    for name, value in truth.weights[result["stage"]].items()
)
assert difference < 2e-3, difference
print("difference", difference, "over", torch.distributed.get_backend(), flush=True)
"""


def run(place: Place) -> dict[str, Any]:
    """What each rank printed; raises where the job fails or differs from the reference."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "train.py")
        script.write_text(_SCRIPT)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "paci_schedule.launch", str(script),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
        environment |= {"DS_ACCELERATOR": "cpu" if place.dry else "cuda", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=place.seconds - 5, check=False
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("difference")]
    if done.returncode or len(lines) != 2:
        raise AssertionError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return {f"rank, {number}": line for number, line in enumerate(lines)}

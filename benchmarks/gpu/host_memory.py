"""Ranks that share the GPU through host memory (`runtime.shared_gpu`), as `paci_schedule.launch` sets them up."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.place import Failed, Place
from testing.ranks import free_port

__all__ = ["run"]

_ROOT = Path(__file__).parents[2]
_SCRIPT = """
import torch
from testing import deepspeed_job
from testing.jobs import Job
from testing.reference.deepspeed import run as reference_of

job = Job(stages=2, accumulation=3, script=("train x4", "drain", "train x3", "drain"), optimizer="sgd")
result = deepspeed_job.train(job)
expected = reference_of(job)
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
        port = str(free_port())
        ranks = [_start(script, rank, port, "cpu" if place.dry else "cuda") for rank in range(2)]
        ends = time.monotonic() + place.seconds - 5
        try:
            said = [rank.communicate(timeout=max(0.1, ends - time.monotonic()))[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    figures = {f"rank {number}": text.strip().splitlines()[-1] for number, text in enumerate(said) if text.strip()}
    if any(rank.returncode for rank in ranks) or not all("difference" in line for line in figures.values()):
        raise Failed(f"exit codes {[rank.returncode for rank in ranks]}: {said[0][-1500:]} {said[1][-1500:]}", figures)
    return figures


def _start(script: Path, rank: int, port: str, accelerator: str) -> subprocess.Popen[str]:
    """A rank as torchrun starts it, but in the process group of this step, which ends with the step."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
        "DS_ACCELERATOR": accelerator,
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    command = [sys.executable, "-m", "paci_schedule.launch", str(script)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

"""`make gpu`: every step is tried on the CPU as far as it goes, and without a GPU the command says what is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = ("engines", "ends", "streams", "synchronisation", "links", "spinning", "memory", "stopwatch", "host_memory",
         "convergence")


def gpu_command(*arguments, seconds):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=seconds, check=False,
    )


def test_without_a_gpu_one_line_says_so_and_what_to_do():
    done = gpu_command(seconds=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "sees no CUDA GPU" in done.stderr
    assert "make gpu-dry-run" in done.stderr


@pytest.mark.parametrize("step", STEPS)
def test_every_step_runs_on_the_cpu_as_far_as_it_can(step, tmp_path):
    file = tmp_path / "gpu.json"
    done = gpu_command("--dry-run", "--only", step, "--json", str(file), seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [result] = json.loads(file.read_text())["steps"]
    assert result["name"] == step
    assert result["outcome"] == ("needs a GPU" if step == "spinning" else "ok")
    assert result.get("figures") or step == "spinning"
    assert step in done.stdout


def test_steps_for_which_no_time_is_left_are_skipped_and_the_file_says_so(tmp_path):
    """Twelve seconds are too few for any step."""
    file = tmp_path / "gpu.json"
    done = gpu_command("--dry-run", "--minutes", "0.2", "--json", str(file), seconds=60)
    assert done.returncode == 0
    assert [(step["name"], step["outcome"]) for step in json.loads(file.read_text())["steps"]] == [
        (name, "skipped") for name in STEPS
    ]

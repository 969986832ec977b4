"""`make gpu`: every step is tried on the CPU as far as it goes, and without a GPU the command says what is missing."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.lifted import without
from benchmarks.gpu.place import Place, Unavailable
from benchmarks.gpu.refused import CASES
from paci_schedule.adapters.megatron.settings import MODEL
from paci_schedule.adapters.refusal import reasons

ROOT = Path(__file__).parents[1]
STEPS = (
    "engines",
    "ends",
    "streams",
    "synchronisation",
    "links",
    "spinning",
    "memory",
    "stopwatch",
    "host_memory",
    "refused",
    "convergence",
)


def gpu_command(*arguments, seconds):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def test_without_a_gpu_one_line_says_so_and_what_to_do():
    done = gpu_command(seconds=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "sees no CUDA GPU" in done.stderr
    assert "make gpu-dry-run" in done.stderr


def test_a_python_without_what_is_needed_is_told_in_one_line():
    command_line = [
        sys.executable,
        "-c",
        "import sys; sys.modules['deepspeed'] = None; import runpy; "
        "runpy.run_module('benchmarks.gpu', run_name='__main__')",
    ]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "has no module 'deepspeed'" in done.stderr
    assert "docs/gpu.md" in done.stderr


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[pytest.mark.slow] * (step in ("convergence", "host_memory"))) for step in STEPS]
)
def test_every_step_runs_on_the_cpu_as_far_as_it_can(step):
    run = import_module(f"benchmarks.gpu.{step}").run
    place = Place(torch.device("cpu"), 250)
    needs = {"spinning": "kernels that spin", "refused": "Transformer Engine's kernels"}
    if step in needs:
        with pytest.raises(Unavailable, match=f"needs a GPU: {needs[step]}"):
            run(place)
    else:
        assert run(place)


@pytest.mark.parametrize("setting", [lifted for _, lifted in CASES.values()])
def test_one_refusal_is_lifted_for_a_gpu_to_tell_whether_it_is_needed(setting):
    asked = Namespace(**{setting: "on"})
    assert len(list(reasons(MODEL, asked))) == 1
    left = without(MODEL, [setting])
    assert not list(reasons(left, asked))
    assert len(left) == len(MODEL) - 1


def test_the_command_runs_each_step_in_a_process_of_its_own_and_writes_what_it_found(tmp_path):
    file = tmp_path / "gpu.json"
    done = gpu_command("--dry-run", "--only", "streams", "spinning", "--json", str(file), seconds=200)
    assert done.returncode == 0, done.stdout + done.stderr
    streams, spinning = json.loads(file.read_text())["steps"]
    assert (streams["outcome"], spinning["outcome"]) == ("ok", "not available")
    assert set(streams["figures"].values()) == {0.0}
    assert "P=4 a=8" in done.stdout
    assert "kernels that spin" in done.stdout


def test_a_step_that_hangs_or_fails_is_told_and_the_command_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "_command_of", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    assert command._run_one("streams", 0.5, dry=True) == {"outcome": "failed", "error": "no result within 0 s: "}
    monkeypatch.setattr(command, "_command_of", lambda *_: [sys.executable, "-c", "print('oh'); exit(3)"])
    assert command._run_one("streams", 30, dry=True) == {"outcome": "failed", "error": "exit code 3 within 30 s: oh\n"}


def test_steps_for_which_no_time_is_left_are_skipped_and_the_file_says_so(tmp_path):
    """Twelve seconds are too few for any step."""
    file = tmp_path / "gpu.json"
    done = gpu_command("--dry-run", "--minutes", "0.2", "--json", str(file), seconds=60)
    assert done.returncode == 0
    assert [(step["name"], step["outcome"]) for step in json.loads(file.read_text())["steps"]] == [
        (name, "skipped") for name in STEPS
    ]

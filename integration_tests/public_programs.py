"""Public training programs on DeepSpeed from stock checkouts, which environment variables name, on two ranks."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["ROOT", "checkout", "config", "is_close_behind", "keys", "run", "started", "stubs"]

ROOT = Path(__file__).resolve().parents[1]
FURTHER = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "paci_schedule.launch")


def checkout(variable):
    """The folder that an environment variable names; the test is skipped where it names none."""
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} names no checkout")
    return Path(path)


def started(script, *arguments, path=()):
    """Run a script on two ranks through the launcher; returns what it wrote.  `arguments` may hold spaces."""
    return run(*TORCHRUN, script, *(word for argument in arguments for word in str(argument).split()), path=path)


def run(*command, path=(), folder=None, ranks=2, ends=(0,), seconds=1800):
    """Run Python, with more folders from which it imports; returns what it wrote.

    Args:
        command: the arguments.
        path: the folders.
        folder: where it runs.
        ranks: how many devices the CPU pretends to be.
        ends: the exit codes that are no error.
        seconds: that it may take.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT), *FURTHER]),
            "DS_ACCELERATOR": "cpu",
            "LOCAL_SIZE": str(ranks),  # which DeepSpeed reads for the number of devices on a CPU
            "LOCAL_WORLD_SIZE": str(ranks),  # for as many devices the CPU plays CUDA
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        },
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode in ends, done.stdout[-6000:]
    return done.stdout


def keys(schedule):
    """What a config has for "1f1b" (nothing), "paci", or "flushed" (PACI's engine, an endless warm-up under 1F1B)."""
    if schedule == "1f1b":
        return {}
    return {"pipeline_schedule": "paci"} | ({"paci": {"flush_warmup_steps": 10**6}} if schedule == "flushed" else {})


def config(folder, schedule, **settings):
    """A DeepSpeed config in a file; the keys of the schedule are the whole difference between two of them."""
    path = folder / f"{schedule}.json"
    path.write_text(json.dumps({**settings, **keys(schedule)}))
    return path


def is_close_behind(paci, stock):
    """Whether losses under PACI, by step, are less than one interval behind 1F1B's, at every step but the first.

    That is, each is less than 1F1B's of the step before, whose losses fall all the time.
    """
    steps = sorted(stock)
    assert steps == sorted(paci)
    pairs = list(itertools.pairwise(steps))
    assert pairs
    falls = all(stock[then] < stock[before] for before, then in pairs)
    return falls and all(paci[then] < stock[before] for before, then in pairs)


def stubs(folder, modules, plays_cuda=False):
    """Stand-ins for packages that are not installed here: source text by the name of the module.

    Args:
        folder: made anew, to be put into the path.
        modules: by name; with dots for a module in a package.
        plays_cuda: whether the CPU plays CUDA in every process (`testing.megatron_cpu`).
    """
    folder.mkdir()
    for name, text in modules.items():
        at = folder
        *packages, last = name.split(".")
        for package, inside in itertools.pairwise([*packages, last]):
            at /= package
            at.mkdir(exist_ok=True)
            with (at / "__init__.py").open("a") as file:
                file.write(f"from . import {inside}\n")
        (at / f"{last}.py").write_text(text)
    if plays_cuda:
        (folder / "sitecustomize.py").write_text("from testing.megatron_cpu import shim\nshim.install()\n")
    return folder

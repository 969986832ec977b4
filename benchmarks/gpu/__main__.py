"""What a single GPU can tell about the CUDA path, whatever its PyTorch and CUDA: correctness first, then costs.

    python -m benchmarks.gpu                       # every step, within 25 minutes
    python -m benchmarks.gpu --only engines ends   # some of them
    python -m benchmarks.gpu --dry-run             # every step as far as a CPU can do it

Every step is a module beside this one.  It runs in a process of its own, with a deadline, and its failure stops no
other; its function `run` takes a `Place` and returns figures by name, or raises where the answer is "no".  The outcome
is a table and one JSON file.  Several ranks share the GPU over NCCL, each with an NCCL_HOSTID of its own, which NCCL
does not promise to support: `testing/ranks.py` sets it up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    for needed in ("click", "deepspeed", "pytest"):  # by the steps, in their own processes
        if find_spec(needed) is None:
            raise ModuleNotFoundError(name=needed)
    import torch
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from benchmarks.gpu.place import Failed, Place, Unavailable
except ModuleNotFoundError as error:
    sys.exit(
        f"make gpu: {sys.executable} has no module {error.name!r}; take a Python that has PyTorch and what docs/gpu.md "
        "lists (make gpu GPU_PYTHON=...), or try the steps on a CPU: make gpu-dry-run"
    )

_ROOT = Path(__file__).parents[2]
_STEPS = (  # in the order of what they tell: name, what it asks, seconds
    ("engines", "Do engines over NCCL train as the reference, synchronised in every op as well?", 300),
    ("ends", "Who is named when a rank dies or hangs?", 240),
    ("streams", "Is the order of streams right, whatever a transfer takes?", 120),
    ("synchronisation", "Where does the host wait for the device?", 90),
    ("links", "What does a link cost: time, blocks of its kernels, memory?", 120),
    ("spinning", "What do receives that are posted early cost the compute beside them?", 60),
    ("memory", "Is the peak memory 1F1B's?", 120),
    ("stopwatch", "Is the engine's account of its time the device's?", 90),
    ("host_memory", "Do ranks that share a GPU through host memory train as the reference?", 90),
    (
        "refused",
        "Does what is refused on Megatron for want of a GPU run: fp8, CUDA graphs, activation offloading?",
        600,
    ),
    ("convergence", "What does the delay cost per token, and what does prediction win back?", 900),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name, *_ in _STEPS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="steps to run")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, as far as it goes; times mean nothing")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all steps together")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"), help="file for every figure")
    parser.add_argument("--step", choices=names, help=argparse.SUPPRESS)  # what a step's own process is started with
    arguments = parser.parse_args()
    if arguments.step:
        _be_a_step(arguments)
        return
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit(
            f"make gpu: PyTorch {torch.__version__} sees no CUDA GPU here; run it on a machine with one, in a Python "
            "whose PyTorch is built for CUDA (make gpu GPU_PYTHON=python3), or try the steps on a CPU: make gpu-dry-run"
        )
    results: dict[str, Any] = {"machine": _machine(arguments.dry_run), "steps": []}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for step in _run_all(arguments):
        results["steps"].append(step)
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    console = Console(width=120)
    for table in _tables(results):
        console.print(table)
    console.print(f"Every figure is in {arguments.json}.")
    sys.exit(any(step["outcome"] == "failed" for step in results["steps"]))


def _run_all(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each step's result, as soon as it is there."""
    ends = time.monotonic() + 60 * arguments.minutes
    for name, asks, seconds in _STEPS:
        if name not in arguments.only:
            continue
        limit = min(seconds, ends - time.monotonic())
        began = time.monotonic()
        if limit < 20:
            result = {"outcome": "skipped", "error": f"less than 20 s of the {arguments.minutes:g} minutes were left"}
        else:
            print(f"{name}: {asks}", flush=True)
            result = _run_one(name, limit, arguments.dry_run)
        print(f"{name}: {result['outcome']}", flush=True)
        yield {"name": name, "asks": asks, **result, "seconds": round(time.monotonic() - began, 1)}


def _run_one(name: str, limit: float, dry: bool) -> dict[str, Any]:
    """Run a step in a process group of its own, which is killed at the deadline."""
    environment = {**os.environ, "DS_BUILD_OPS": "0", "PACI_TEST_BACKEND": "gloo" if dry else "nccl_shared"}
    if dry:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder, "result.json"), Path(folder, "log")
        command = _command_of(name, limit, file, dry)
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=_ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what a step that has ended has left behind
            code = process.wait()
        if file.exists():
            return json.loads(file.read_text())
        ended, said = "no result" if code == -signal.SIGKILL else f"exit code {code}", log.read_text(errors="replace")
        return {"outcome": "failed", "error": f"{ended} within {limit:.0f} s: {said[-2000:]}"}


def _command_of(name: str, limit: float, file: Path, dry: bool) -> list[str]:
    """What starts this program as one step."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--step", name, "--json", str(file)]
    return [*command, "--minutes", str(limit / 60), *(["--dry-run"] if dry else [])]


def _be_a_step(arguments: argparse.Namespace) -> None:
    place = Place(torch.device("cpu" if arguments.dry_run else "cuda"), 60 * arguments.minutes)
    step = import_module(f"benchmarks.gpu.{arguments.step}")
    try:
        result: dict[str, Any] = {"outcome": "ok", "figures": step.run(place)}
    except Unavailable as error:
        result = {"outcome": "not available", "error": str(error)}
    except Failed as error:
        result = {"outcome": "failed", "figures": error.figures, "error": str(error)}
    except Exception:
        result = {"outcome": "failed", "error": traceback.format_exc()[-4000:]}
    arguments.json.write_text(json.dumps(result))


def _machine(dry: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "dry run": dry,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "torch": torch.__version__,
    }
    for package in ("deepspeed", "megatron-core", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if not dry:
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu memory GiB": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def _tables(results: dict[str, Any]) -> list[Table]:
    shown = Table(
        "step",
        "outcome",
        "seconds",
        "question",
        title=", ".join(f"{key} {value}" for key, value in results["machine"].items()),
    )
    figures = Table("step", "figure", "value")
    for step in results["steps"]:
        shown.add_row(step["name"], step["outcome"], f"{step['seconds']:.0f}", step["asks"])
        for name, value in step.get("figures", {}).items():
            figures.add_row(step["name"], name, f"{value:.4g}" if isinstance(value, float) else escape(str(value)))
        if "error" in step:
            figures.add_row(step["name"], step["outcome"], escape(step["error"].strip().splitlines()[-1]))
    return [shown, figures]


if __name__ == "__main__":
    main()

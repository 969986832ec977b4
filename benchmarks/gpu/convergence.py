"""What a delayed gradient costs per token at GPT-2 small's scale, and what predicted weights win back.

`paci rehearse` emulates eight stages in one process on the sources of Python's standard library: 1F1B, PACI, and PACI
with prediction, at equal tokens and in equal ideal time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.place import Place

__all__ = ["run"]

_ROOT = Path(__file__).parents[2]
_CHARACTERS = 20_000_000
_DRY = {"stages": 2, "accumulation": 2, "layers": 2, "width": 24, "context": 16, "micro-batch": 2, "updates": 4}
_REAL = {"stages": 8, "accumulation": 8, "layers": 16, "width": 768, "context": 256, "micro-batch": 8, "updates": 600}


def run(place: Place) -> dict[str, Any]:
    """The validation losses, by schedule and prediction."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(_sources(20_000 if place.dry else _CHARACTERS))
        sizes = [word for name, size in (_DRY if place.dry else _REAL).items() for word in (f"--{name}", str(size))]
        command = [
            sys.executable, "-m", "paci_schedule.cli", "rehearse", "--text", str(text), *sizes,
            "--lr", "6e-4", "--schedules", "flush,paci", "--prediction", "off,every",
            "--device", place.device.type, "--json",
        ]
        environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
        done = subprocess.run(
            command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=place.seconds - 5, check=False
        )
    if done.returncode:
        raise AssertionError(f"exit code {done.returncode}: {done.stderr[-2000:]}")
    figures: dict[str, Any] = {}
    for each in json.loads(done.stdout)["runs"]:
        for when in ("equal_tokens", "equal_time"):
            trial = each[when]
            name = f"{trial['schedule']}, prediction {trial['prediction']}, {when.replace('_', ' ')}"
            figures[f"{name}: validation loss"] = trial["validation"]
            figures[f"{name}: updates"] = trial["updates"]
            figures[f"{name}: seconds"] = trial["seconds"]
    return figures


def _sources(most: int) -> str:
    """Python's standard library as one text of plain characters, at most `most` of them."""
    parts, count = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in file.parts or count >= most:
            continue
        parts.append(file.read_bytes().decode("ascii", errors="ignore"))
        count += len(parts[-1])
    return "".join(parts)[:most]

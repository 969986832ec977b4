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
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.place import Failed, Place

__all__ = ["run"]

_ROOT = Path(__file__).parents[2]
_CHARACTERS = 20_000_000
_DRY = {"stages": 2, "accumulation": 2, "layers": 2, "width": 24, "context": 16, "micro-batch": 2}
_REAL = {"stages": 8, "accumulation": 8, "layers": 16, "width": 768, "context": 256, "micro-batch": 8}
_TRIALS = (("flush", "off"), ("paci", "every"), ("paci", "off"), ("paci", "window"))
_WORK = 6.0  # what the trials take together, in trials under flush at equal tokens: predictions cost a step each
_FEWEST, _MOST = 200, 2000


def run(place: Place) -> dict[str, Any]:
    """The validation losses, by schedule and prediction, after as many updates as the time allows."""
    ends = time.monotonic() + place.seconds - 10
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(_sources(20_000 if place.dry else _CHARACTERS))
        updates = 4
        if not place.dry:
            [first] = _rehearsed(text, place, 20, *_TRIALS[0], ends)
            left = ends - time.monotonic()
            updates = int(max(_FEWEST, min(_MOST, 20 * left / (_WORK * first["equal_tokens"]["seconds"]))))
        for trial in _TRIALS:
            try:
                [found] = _rehearsed(text, place, updates, *trial, ends)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                raise Failed(f"{trial}: {str(error)[-1500:]}", figures) from error
            for when, what in (("equal_tokens", "at equal tokens"), ("equal_time", "in equal ideal time")):
                name = f"{trial[0]}, prediction {trial[1]}, {what}"
                for figure in ("updates", "validation", "seconds"):
                    figures[f"{name}: {figure}"] = found[when][figure]
    return figures


def _rehearsed(text: Path, place: Place, updates: int, schedule: str, prediction: str, ends: float) -> list[Any]:
    """What `paci rehearse` prints of one schedule."""
    sizes = {**(_DRY if place.dry else _REAL), "updates": updates, "lr": 6e-4, "device": place.device.type}
    command = [sys.executable, "-m", "paci_schedule.cli", "rehearse", "--text", str(text), "--json"]
    command += ["--schedules", schedule, "--prediction", prediction]
    command += [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    done = subprocess.run(
        command,
        cwd=_ROOT,
        env={**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
        capture_output=True,
        text=True,
        timeout=max(1.0, ends - time.monotonic()),
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"exit code {done.returncode}: {done.stderr[-1500:]}")
    return json.loads(done.stdout)["runs"]


def _sources(most: int) -> str:
    """Python's standard library as one text of plain characters, at most `most` of them."""
    parts, count = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in file.parts or count >= most:
            continue
        parts.append(file.read_bytes().decode("ascii", errors="ignore"))
        count += len(parts[-1])
    return "".join(parts)[:most]

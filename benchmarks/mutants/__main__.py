"""Break the code on purpose, one rule at a time, and see which test notices: ``make mutants``.

Each mutant is one wrong piece of code.  It is put into a copy of the tree, where the tests that guard the rule run
until one of them fails.  That test has killed the mutant; a run that does not end within the deadline has, too, since a
broken schedule often makes ranks wait for each other for ever.  A mutant that survives, or a test that fails without
any mutant, ends the programme with an error.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from benchmarks.mutants import ROOT, Mutant, mutated
from benchmarks.mutants.listed import MUTANTS

_LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.egg-info")


class _Verdict(NamedTuple):
    """What pytest said of a copy: its exit status, None at the deadline; the test that failed; all that it printed."""

    status: int | None
    failed: str
    output: str


def _ask(copy: Path, tests: Sequence[str], deadline: float) -> _Verdict:
    """Run tests in a copy of the tree, until one fails: files without their slow tests, or tests named one by one."""
    chosen = [] if any("::" in test for test in tests) else ["-m", "not slow"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rfE", "-p", "no:cacheprovider", *chosen, *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    asked = subprocess.Popen(
        command,
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that ranks that wait for ever end with it
    )
    try:
        output, _ = asked.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        os.killpg(asked.pid, signal.SIGKILL)
        return _Verdict(None, "", asked.communicate()[0])
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?\.py::.+?)(?: - .*)?$", output, re.MULTILINE)
    return _Verdict(asked.returncode, failed[1] if failed else "", output)


def _killer(mutant: Mutant, copies: SimpleQueue[Path], deadline: float) -> tuple[str, float]:
    """The test that kills the mutant, empty if none does; and how many seconds that took."""
    copy, started = copies.get(), time.monotonic()
    file = copy / mutant.file
    right = file.read_text(encoding="utf-8")
    try:
        file.write_text(mutated(mutant, copy), encoding="utf-8")
        verdict = _ask(copy, mutant.tests, deadline)
    finally:
        file.write_text(right, encoding="utf-8")
        copies.put(copy)
    if verdict.status not in (0, 1, None) or (verdict.status == 1 and not verdict.failed):
        raise SystemExit(f"{mutant.file}, {mutant.does}: the tests did not run\n{verdict.output[-3000:]}")
    killer = f"the deadline of {deadline:g} s in {mutant.tests[0]}" if verdict.status is None else verdict.failed
    return killer, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="", help="only the mutants of this rule")
    parser.add_argument("--deadline", type=float, default=150.0, help="seconds for the tests of one mutant")
    parser.add_argument("--workers", type=int, default=2, help="mutants that are tried side by side")
    arguments: Any = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.rule in ("", mutant.rule)]
    if not chosen:
        parser.error(f"--rule {arguments.rule}: must be one of {', '.join(sorted({each.rule for each in MUTANTS}))}")
    for mutant in chosen:
        mutated(mutant)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.workers) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(arguments.workers):
            copies.put(Path(shutil.copytree(ROOT, Path(folder, str(number)), ignore=_LEFT_BEHIND)))
        copy, asked = copies.get(), dict.fromkeys(test for mutant in chosen for test in mutant.tests)
        for part in ([test for test in asked if "::" not in test], [test for test in asked if "::" in test]):
            unharmed = _ask(copy, part, 900.0) if part else None
            if unharmed is not None and unharmed.status != 0:
                raise SystemExit(f"the tests do not pass without a mutant\n{unharmed.output[-3000:]}")
        copies.put(copy)
        print("| rule | the mutant | killed by | seconds |\n|---|---|---|---|", flush=True)
        survivors = 0
        found = pool.map(lambda mutant: _killer(mutant, copies, arguments.deadline), chosen)
        for mutant, (killer, seconds) in zip(chosen, found, strict=True):
            survivors += not killer
            print(f"| {mutant.rule} | {mutant.does} | `{killer or 'NOBODY'}` | {seconds:.0f} |", flush=True)
    if survivors:
        raise SystemExit(f"{survivors} of {len(chosen)} mutants survive")
    print(f"all {len(chosen)} mutants are killed")


if __name__ == "__main__":
    main()

"""Kills at random moments of a DeepSpeed engine's saves, and what loads afterwards: ``make soak-saves``.

Chains of jobs of two stages: each job loads the newest checkpoint, compares every weight with the reference at that
update, difference 0, trains one batch, and saves, mostly under the same tag; one rank or both are killed in that save.
The seeds are 0, 1, 2, ...  A loss is a checkpoint that does not load, is older than the newest whole one, or has a
weight that is not the reference's.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from testing import deepspeed_job, jobs, kills
from testing.jobs import Job
from testing.reference.deepspeed import Reference

_JOB = Job(stages=2, accumulation=1, script=(), config={"paci": {"timeout": 5}})
_OPERATIONS = 24  # of files, of a rank in such a save, about


def save_once(kill: kills.Kill, folder: str, expected: str) -> None:
    """What a rank of one job does."""
    engine = deepspeed_job.build(_JOB)
    engine.load_checkpoint(folder)
    update = engine.global_steps
    if update:
        weights = deepspeed_job.weights(engine)
        truth = torch.load(expected, weights_only=True)[update - 1][engine.stage_id]
        assert weights.keys() == truth.keys()
        apart = {name: (weights[name] - value).abs().max().item() for name, value in truth.items()}
        assert not any(apart.values()), f"update {update} of stage {engine.stage_id}: {apart}"
    kills.loaded(update)
    engine.train_batch(jobs.data(_JOB.model, first=update))
    engine.drain()
    with kills.saving(kill):
        engine.save_checkpoint(folder, tag="common" if update % 3 else None)


def chain(folder: Path, expected: Path, seeds: range) -> Counter[str]:
    """One save after the other on one folder.  Returns what happened how often; a loss is an error."""
    folder.mkdir()
    newest, saved, counted = 0, False, Counter[str]()
    drawn = (kills.Kill.drawn(seed, 2, _OPERATIONS) for seed in seeds)
    for each in kills.rounds(save_once, 2, (str(folder), str(expected)), drawn):
        assert each.found == newest + 1 if saved else each.found in (newest, newest + 1), each
        counted["the update before was loaded" if each.found == newest else "the update saved was loaded"] += 1
        newest, saved = each.found, each.saved
        counted["saves"] += 1
        counted["saves in which a rank died"] += "died" in each.ends
        counted["ranks killed"] += each.ends.count("died")
        counted["ranks left that named the lost one"] += sum("LinkError" in end for end in each.ends)
        assert all(end in ("died", "returned") or "LinkError" in end for end in each.ends), each
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="saves, each with a kill drawn from its seed")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--chains", type=int, default=4, help="chains of jobs that run side by side")
    arguments: Any = parser.parse_args()
    torch.set_num_threads(1)  # as the ranks compute, to the last bit
    started, length = time.monotonic(), -(-arguments.kills // arguments.chains)
    reference = Reference(dataclasses.replace(_JOB, script=("train", "drain") * length))
    truth = [moment.weights for moment in reference.run()[1::2]]
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(arguments.chains) as pool:
        expected = Path(root, "expected.pt")
        torch.save(truth, expected)
        ends = [
            pool.submit(
                chain,
                Path(root, str(number)),
                expected,
                range(arguments.first_seed + number, arguments.first_seed + arguments.kills, arguments.chains),
            )
            for number in range(arguments.chains)
        ]
        counted = sum((end.result() for end in ends), Counter[str]())
    for what, count in counted.items():
        print(f"{count:5} {what}")
    print(f"nothing lost, in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

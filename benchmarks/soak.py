"""Random sequences of calls for as long as you like, with faults and without: ``make soak``.

Each turn draws jobs from the next seed, on all three frameworks, and compares every weight with the reference after
every call, difference 0.  DeepSpeed's are carried out once without a fault, where memory, files, threads and shared
memory must not grow, and once with two faults, after each of which the next life goes on from the newest checkpoint.  A
loss is a weight that is not the reference's, a checkpoint older than the newest that all ranks have saved, or a rank
that does not end.  The first one ends the programme, with the seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import re
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from testing import deepspeed_job, lives, ranks, resources, sequences, torch_job
from testing.jobs import Job
from testing.megatron_job import train_all
from testing.reference import megatron
from testing.reference.deepspeed import Moment, Reference

_TIMEOUT = 10  # seconds that a rank waits for another one
_WARM_UP = ("train x3", "eval", "save", "train", "drained", "accumulate=2", "train x2", "reset", "train x2", "save")
_ONE_REFERENCE = threading.Lock()  # it builds models from the one generator of random numbers


def _expected(job: Job) -> list[Moment]:
    with _ONE_REFERENCE:
        return Reference(job).run()


def _drawn(seed: int, length: int) -> Job:
    """A DeepSpeed job; its calls begin with one of every kind that makes something for the first time."""
    job = sequences.deepspeed_job(seed, 2 + seed % 2, length)
    config = {"paci": {**job.options, "timeout": _TIMEOUT}}
    return dataclasses.replace(job, script=(*_WARM_UP, *job.script), config=config)


def _compared(moments: Iterable[Path], expected: list[Moment]) -> list[list[int]]:
    """By stage, the actions after which it was as the reference."""
    numbers: list[list[int]] = []
    for stage, path in enumerate(moments):
        numbers.append([])
        for number, moment in lives.written(path) if path.exists() else ():
            deepspeed_job.assert_moment(moment, expected[number], stage, number)
            numbers[-1].append(number)
    return numbers


def _without_faults(seed: int, length: int) -> Counter[str]:
    job = _drawn(seed, length)
    with tempfile.TemporaryDirectory() as folder:
        moments = f"{folder}/moments"
        held = ranks.run_ranks(lives.live, job.stages, (job, None, f"{folder}/saved", moments), timeout=400)
        expected = _expected(job)
        numbers = _compared([Path(f"{moments}-{stage}") for stage in range(job.stages)], expected)
    assert numbers == [list(range(len(expected)))] * job.stages
    for rank, readings in enumerate(held):
        resources.assert_flat(readings, f"rank {rank}")
    return Counter({"sequences on DeepSpeed without faults": 1, "calls of engines": sum(map(len, numbers))})


def _with_faults(seed: int, length: int) -> Counter[str]:
    job, draw = _drawn(seed, length), random.Random(seed)
    if job.precision == "bf16-bf16":  # which DeepSpeed's BF16_Optimizer cannot load without ZeRO
        job = dataclasses.replace(job, precision="bf16")
    expected, counted = _expected(job), Counter({"sequences on DeepSpeed with faults": 1})
    saves = [number for number, action in enumerate(job.actions()) if action == "save"]
    newest = 0
    with tempfile.TemporaryDirectory() as folder:
        for life in itertools.count():
            fault = lives.Fault.drawn(draw, job.stages) if life < 2 else None
            moments = f"{folder}/moments{life}"
            outcomes = ranks.gather_outcomes(
                lives.live,
                job.stages,
                (job, fault, f"{folder}/saved", moments),
                timeout=400,
                grace=2 * _TIMEOUT,
            )
            begun = {
                int(at) for each in outcomes for at in re.findall(r"^went on from action (\d+)\.$", each.output, re.M)
            }
            assert len(begun) == 1, [each.error or each.output[-2000:] for each in outcomes]
            assert begun.pop() >= newest, f"life {life} went on from an older checkpoint than that of action {newest}"
            numbers = _compared([Path(f"{moments}-{stage}") for stage in range(job.stages)], expected)
            counted["calls of engines"] += sum(map(len, numbers))
            everywhere = set.intersection(*map(set, numbers))
            newest = max([newest, *(number + 1 for number in saves if number in everywhere)])
            ended = [each.ended for each in outcomes]
            if set(ended) == {"returned"}:
                assert all(part[-1] == len(expected) - 1 for part in numbers)
                return counted
            assert fault is not None, [each.error or each.output[-2000:] for each in outcomes]
            counted[f"faults: {fault.kind}"] += 1
            for each in outcomes:
                if each.rank == fault.rank:
                    wanted = {"kill": "died", "stop": "killed", "raise": "raised"}[fault.kind]
                    assert each.ended == wanted, (fault, each)
                elif each.ended == "returned":
                    counted["ranks left that had no call to wait in"] += 1
                else:
                    assert each.ended == "raised", (fault, each)
                    named = each.raised[0] == "LinkError"
                    counted["ranks left that named the lost one" if named else "ranks left with another error"] += 1
                    if not named:
                        print(f"seed {seed}, {fault}: {each.error.splitlines()[-1]}", flush=True)
    raise AssertionError


def _on_torch(seed: int, length: int) -> Counter[str]:
    drawn = [sequences.torch_job(3 * seed + number, 2 + seed % 3, length) for number in range(3)]
    for job, results in zip(drawn, torch_job.run_all(*((job, {}) for job in drawn), timeout=400), strict=True):
        for result in results:
            for number, (moment, truth) in enumerate(zip(result["moments"], _expected(job), strict=True)):
                moment["loss"] = truth.loss[result["stage"]] = float("nan")
                deepspeed_job.assert_moment(moment, truth, result["stage"], number)
    calls = sum(job.stages * len(list(job.actions())) for job in drawn)
    return Counter({"sequences on torch.distributed.pipelining": 3, "calls of schedules": calls})


def _on_megatron(seed: int, length: int) -> Counter[str]:
    drawn = [sequences.gpt_job(3 * seed + number, 2, length // 5) for number in range(3)]
    found = ranks.run_ranks(train_all, 2, (drawn,), timeout=400)
    [expected] = ranks.run_ranks(megatron.train_all, 1, (drawn,), timeout=400)
    for number, job in enumerate(drawn):
        for stage, (got, truth) in enumerate(zip((each[number] for each in found), expected[number], strict=True)):
            for name, weight in got.weights.items():
                assert torch.equal(weight.float(), truth.weights[name].float()), f"{job}, stage {stage}, {name}"
            assert got.norms == truth.norms, (job, stage)
            assert got.stats["backwards"] == len(truth.drift), (job, stage)
    return Counter(
        {"sequences on Megatron-core": 3, "calls of Megatron's function": sum(2 * job.calls for job in drawn)}
    )


_TURN = (_with_faults, _without_faults, _with_faults, _on_torch, _with_faults, _on_megatron)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no new sequence begins after so many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=40, help="calls in a sequence")
    parser.add_argument("--workers", type=int, default=2, help="jobs side by side")
    arguments: Any = parser.parse_args()
    torch.set_num_threads(1)  # as the ranks compute, to the last bit
    started = time.monotonic()
    seeds, turns = itertools.count(arguments.first_seed), itertools.cycle(_TURN)
    total: Counter[str] = Counter()
    taking, lost = threading.Lock(), threading.Event()

    def work() -> None:
        while time.monotonic() - started < arguments.seconds and not lost.is_set():
            with taking:
                seed, kind = next(seeds), next(turns)
            try:
                counted = kind(seed, arguments.length)
            except BaseException:
                lost.set()
                traceback.print_exc()
                raise SystemExit(f"seed {seed}, {kind.__name__.strip('_')}: lost") from None
            with taking:
                total.update(counted)

    with ThreadPoolExecutor(arguments.workers) as pool:
        for end in [pool.submit(work) for _ in range(arguments.workers)]:
            end.result()
    for what, count in sorted(total.items()):
        print(f"{count:7} {what}")
    last = next(seeds) - 1
    print(f"nothing lost, in {time.monotonic() - started:.0f} s, seeds {arguments.first_seed} to {last}")


if __name__ == "__main__":
    main()

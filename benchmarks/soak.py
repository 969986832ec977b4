"""Random sequences of calls for as long as you like, with faults and without: ``make soak``.

Each turn draws a job of one of the three frameworks from the next seed, and compares every weight with the reference
after every call, difference 0 (on Megatron-core the norm of every update, and the weights at the end).  Of three jobs
one is carried out without a fault; there memory, files, threads and shared memory must not grow.  Two have two faults
each, after each of which the next life goes on from the newest checkpoint.  A loss is a weight that is not the
reference's, a checkpoint older than the newest that all ranks have saved, or a rank that does not end.  The first one
ends the programme, with the seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import random
import re
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from testing import deepspeed_job, lives, ranks, resources, sequences
from testing.jobs import Job
from testing.megatron_job import live as live_on_megatron
from testing.megatron_model import GptJob
from testing.reference import megatron
from testing.reference.deepspeed import Moment, Reference

_TIMEOUT = 10  # seconds that a rank waits for another one
_WARM_UP = ("train x3", "eval", "save", "train", "drained", "accumulate=2", "train x2", "reset", "train x2", "save")
_TORCH_WARM_UP = ("train x3", "drain", "save", "train", "drain", "load", "train x2")
_DEEPSPEED, _TORCH, _MEGATRON = "DeepSpeed", "torch.distributed.pipelining", "Megatron-core"
_ONE_REFERENCE = threading.Lock()  # it builds models from the one generator of random numbers


def _expected(job: Job) -> list[Moment]:
    with _ONE_REFERENCE:
        return Reference(job).run()


def _on_deepspeed(seed: int, length: int) -> Job:
    """A DeepSpeed job; its calls begin with one of every kind that makes something for the first time."""
    job = sequences.deepspeed_job(seed, 2 + seed % 2, length)
    config = {"paci": {**job.options, "timeout": _TIMEOUT}}
    return dataclasses.replace(job, script=(*_WARM_UP, *job.script), config=config)


def _on_torch(seed: int, length: int) -> Job:
    """A job of torch.distributed.pipelining, likewise."""
    job = sequences.torch_job(seed, 2 + seed % 2, length)
    evaluates, flushes = ("eval" in job.script, "schedule=1f1b" in job.script)
    warm_up = (*_TORCH_WARM_UP, *["eval"] * evaluates, *("schedule=1f1b", "train x2", "schedule=paci") * flushes)
    config = {"paci": {**job.options, "timeout": _TIMEOUT}}
    return dataclasses.replace(job, script=(*warm_up, *job.script), config=config)


def _on_megatron(seed: int, length: int) -> GptJob:
    """A Megatron job; its first calls are of every kind, too."""
    calls = length // 2
    job = sequences.gpt_job(seed, 2, calls)
    return dataclasses.replace(
        job,
        # The distributed optimizer saves its state in another way.
        distributed_optimizer=False,
        resume_after=None,
        evaluate_after=tuple(sorted({1, 2, *job.evaluate_after})),
        paci={**job.paci, "timeout": _TIMEOUT},
    )


def _compared(moments: Iterable[Path], expected: list[Moment], losses: bool) -> list[list[int]]:
    """By stage, the actions after which it was as the reference."""
    numbers: list[list[int]] = []
    for stage, path in enumerate(moments):
        numbers.append([])
        for number, moment in lives.written(path) if path.exists() else ():
            truth = expected[number]
            if not losses:  # what a schedule of PyTorch's tells of them is another thing
                truth.loss[stage] = moment["loss"] = math.nan
            deepspeed_job.assert_moment(moment, truth, stage, number)
            numbers[-1].append(number)
    return numbers


class _Calls:
    """Jobs of DeepSpeed or of torch.distributed.pipelining, whose stages write down what they come to."""

    def __init__(self, name: str, job: Job) -> None:
        self.name, self.stages = name, job.stages
        if job.precision == "bf16-bf16":  # which DeepSpeed's BF16_Optimizer cannot load without ZeRO
            job = dataclasses.replace(job, precision="bf16")
        self._job, self._expected = job, _expected(job)
        self._begin = lives.on_deepspeed if name == _DEEPSPEED else lives.on_torch
        self._saves = [number for number, action in enumerate(job.actions()) if action == "save"]

    def life(self, fault: lives.Fault | None, folder: str, number: int) -> list[ranks.Outcome]:
        self._moments = [Path(f"{folder}/moments{number}-{stage}") for stage in range(self.stages)]
        arguments = (self._job, fault, f"{folder}/saved", f"{folder}/moments{number}", self._begin)
        return ranks.gather_outcomes(lives.live, self.stages, arguments, timeout=400, grace=2 * _TIMEOUT)

    def compared(self, outcomes: list[ranks.Outcome]) -> tuple[int, int, list[Any]]:
        """Calls that were as the reference, the action after the newest checkpoint, and what the ranks held."""
        numbers = _compared(self._moments, self._expected, self.name == _DEEPSPEED)
        everywhere = set.intersection(*map(set, numbers))
        if all(each.ended == "returned" for each in outcomes):
            assert all(part[-1] == len(self._expected) - 1 for part in numbers)
        newest = max((number + 1 for number in self._saves if number in everywhere), default=0)
        return sum(map(len, numbers)), newest, [each.value for each in outcomes]


class _Updates:
    """Jobs of Megatron-core, of which the norms of every update and the weights at the end are compared."""

    name, stages = "Megatron-core", 2

    def __init__(self, job: GptJob) -> None:
        self._job = job
        [[self._expected]] = ranks.run_ranks(megatron.train_all, 1, ([job],), timeout=400)

    def life(self, fault: lives.Fault | None, folder: str, _: int) -> list[ranks.Outcome]:
        arguments = (self._job, fault, f"{folder}/saved")
        return ranks.gather_outcomes(live_on_megatron, self.stages, arguments, timeout=400, grace=2 * _TIMEOUT)

    def compared(self, outcomes: list[ranks.Outcome]) -> tuple[int, int, list[Any]]:
        calls = 0
        for each, truth in zip(outcomes, self._expected, strict=True):
            if each.ended == "returned":
                first, got, _ = each.value
                for name, weight in got.weights.items():
                    assert torch.equal(weight.float(), truth.weights[name].float()), f"{self._job}, {each.rank}, {name}"
                assert got.norms == truth.norms[first:], (self._job, each.rank)
                calls += len(got.norms)
        return calls, 0, [each.value and each.value[2] for each in outcomes]


def _job(kind: str, seed: int, length: int) -> _Calls | _Updates:
    if kind == _MEGATRON:
        return _Updates(_on_megatron(seed, length))
    return _Calls(kind, (_on_deepspeed if kind == _DEEPSPEED else _on_torch)(seed, length))


def _without_faults(kind: str, seed: int, length: int) -> Counter[str]:
    job = _job(kind, seed, length)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = job.life(None, folder, 0)
        assert all(each.ended == "returned" for each in outcomes), [each.error for each in outcomes]
        calls, _, held = job.compared(outcomes)
    for rank, readings in enumerate(held):
        resources.assert_flat(readings, f"rank {rank}")
    return Counter({f"{kind}: sequences without faults": 1, f"{kind}: calls": calls})


def _with_faults(kind: str, seed: int, length: int) -> Counter[str]:
    job, draw = _job(kind, seed, length), random.Random(seed)
    counted, newest = Counter({f"{kind}: sequences with faults": 1}), 0
    with tempfile.TemporaryDirectory() as folder:
        for life in itertools.count():
            fault = lives.Fault.drawn(draw, job.stages) if life < 2 else None
            outcomes = job.life(fault, folder, life)
            begun = {
                int(at) for each in outcomes for at in re.findall(r"^went on from action (\d+)\.$", each.output, re.M)
            }
            assert len(begun) == 1, [each.error or each.output[-2000:] for each in outcomes]
            assert (at := begun.pop()) >= newest, f"life {life} went on from {at}, older than action {newest}"
            calls, saved, _ = job.compared(outcomes)
            counted[f"{kind}: calls"] += calls
            newest = max(newest, saved)
            if all(each.ended == "returned" for each in outcomes):
                return counted
            assert fault is not None, [each.error or each.output[-2000:] for each in outcomes]
            counted[f"{kind}: faults: {fault.kind}"] += 1
            counted.update(_ends(kind, seed, fault, outcomes))
    raise AssertionError


def _ends(kind: str, seed: int, fault: lives.Fault, outcomes: list[ranks.Outcome]) -> Iterator[str]:
    """How the ranks of a life with a fault ended, each as one of several kinds."""
    for each in outcomes:
        if each.rank == fault.rank:
            wanted = {"kill": "died", "stop": "killed", "raise": "raised"}[fault.kind]
            assert each.ended == wanted, (fault, each)
        elif each.ended == "returned":
            yield f"{kind}: ranks left that had no call to wait in"
        else:
            assert each.ended == "raised", (fault, each)
            named = each.raised[0] == "LinkError"
            yield f"{kind}: ranks left " + ("that named the lost one" if named else "with another error")
            if not named:
                print(f"{kind}, seed {seed}, {fault}: {each.error.splitlines()[-1]}", flush=True)


_TURN = tuple(
    (carry_out, kind)
    for kind in (_DEEPSPEED, _TORCH, _MEGATRON)
    for carry_out in (_with_faults, _without_faults, _with_faults)
)


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
                seed, (carry_out, kind) = next(seeds), next(turns)
            try:
                counted = carry_out(kind, seed, arguments.length)
            except BaseException:
                lost.set()
                traceback.print_exc()
                said = f"{kind}, seed {seed}, {carry_out.__name__.strip('_')}: lost"
                print(said, file=sys.stderr, flush=True)  # at once; another job may take minutes
                raise SystemExit(said) from None
            with taking:
                total.update(counted)

    try:
        with ThreadPoolExecutor(arguments.workers) as pool:
            for end in [pool.submit(work) for _ in range(arguments.workers)]:
                end.result()
    finally:  # what was counted until a loss counts, too
        for what, count in sorted(total.items()):
            print(f"{count:7} {what}", flush=True)
    last = next(seeds) - 1
    print(f"nothing lost, in {time.monotonic() - started:.0f} s, seeds {arguments.first_seed} to {last}")


if __name__ == "__main__":
    main()

"""Two stages with two replicas each, which train on different data: as the reference with replicas, difference 0.

Also explained here: what ZeRO stage 1 with bf16 accumulation does to gradients that BF16_Optimizer does otherwise.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from integration_tests.test_deepspeed_collectives import recorded
from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference.deepspeed import run as reference_of
from testing.reference.updaters import ZeroArithmetic

REPLICAS = 2
MIXED = ("train x3", "drain", "train x2", "eval", "train x4", "save", "train x3")
STEADY = ("train x4", "eval", "train x3", "drain")
ZERO = {
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000},
    "zero_allow_untested_optimizer": True,
}
BY_STAGE = {"paci": {"clip": "stage"}}

JOBS = {
    "fp32": Job(stages=2, accumulation=3, script=MIXED, warmup=True),
    "fp32, clipping": Job(stages=2, accumulation=2, script=MIXED, clip=0.4, config=BY_STAGE),
    "fp32, ZeRO-1": Job(stages=2, accumulation=3, script=MIXED, config=ZERO, optimizer="groups"),
    "fp32, ZeRO-1, clipping": Job(stages=2, accumulation=3, script=MIXED, clip=0.4, config={**ZERO, **BY_STAGE}),
    "fp32, prescaled": Job(stages=2, accumulation=3, script=MIXED, config={"prescale_gradients": True}),
    "fp32, predivided": Job(stages=2, accumulation=3, script=MIXED, config={"gradient_predivide_factor": 4.0}),
    "bf16": Job(stages=2, accumulation=3, script=MIXED, precision="bf16", warmup=True),
    "bf16, clipping": Job(
        stages=2, accumulation=2, script=MIXED, precision="bf16", clip=0.4, optimizer="groups", config=BY_STAGE
    ),
    "bf16 sums": Job(stages=2, accumulation=3, script=MIXED, precision="bf16-bf16"),
    "bf16 sums, ZeRO-1": Job(stages=2, accumulation=3, script=MIXED, precision="bf16-bf16", config=ZERO, warmup=True),
    "bf16 sums, ZeRO-1, clipping": Job(
        stages=2,
        accumulation=3,
        script=MIXED,
        precision="bf16-bf16",
        clip=0.4,
        optimizer="groups",
        config={**ZERO, **BY_STAGE},
    ),
}
GLOBAL = {  # clipped by the norm over all stages
    "fp32": Job(stages=2, accumulation=3, script=MIXED, clip=0.4),
    "fp32, ZeRO-1": Job(stages=2, accumulation=3, script=MIXED, clip=0.4, config=ZERO),
    "bf16": Job(stages=2, accumulation=3, script=MIXED, clip=0.4, precision="bf16"),
    "bf16 sums, ZeRO-1": Job(stages=2, accumulation=3, script=MIXED, clip=0.4, precision="bf16-bf16", config=ZERO),
    "shapes that differ": Job(
        stages=2,
        accumulation=2,
        script=MIXED,
        clip=0.4,
        shapes=((3, 5), (2, 3), (3, 1), (1, 5), (2, 2), (3, 4), (1, 1)),
    ),
    "tied": Job(stages=2, accumulation=1, script=MIXED, model="tied", clip=2.0),
    "tied, bf16": Job(stages=2, accumulation=2, script=STEADY, model="tied", clip=2.0, precision="bf16"),
}
ALL = JOBS | {f"global, {name}": job for name, job in GLOBAL.items()}
FAST = {
    "fp32",
    "fp32, ZeRO-1",
    "bf16",
    "bf16 sums",
    "bf16 sums, ZeRO-1",
    "global, fp32, ZeRO-1",
    "global, shapes that differ",
    "global, tied",
}


def follow_all(scripts: dict[str, Job], folder: str) -> dict[str, Any]:
    """What a rank does: one job after another, and two more batches of each, whose collectives count."""
    heard: list[tuple[str, list[int]]] = []
    with recorded(lambda name, members: heard.append((name, members))):
        return {name: follow(job, f"{folder}/{number}", heard) for number, (name, job) in enumerate(scripts.items())}


def follow(job: Job, folder: str, heard: list[tuple[str, list[int]]]) -> dict[str, Any]:
    engine = deepspeed_job.build(job)
    mine = job.of_replica(engine.grid.get_data_parallel_rank())
    result = deepspeed_job.follow(engine, mine, folder=folder)
    feed = jobs.data(mine.model, 5_000)
    heard.clear()
    for _ in range(2):
        engine.train_batch(feed)
    return {
        **result,
        "collectives": list(heard),
        "optimizer": type(engine.optimizer).__name__,
        "group": sorted(torch.distributed.get_process_group_ranks(engine.grid.get_data_parallel_group())),
    }


class Followed(dict[str, list[dict[str, Any]]]):
    """What the ranks of each job returned; jobs of fast tests are carried out together, and so are the others."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, name: str) -> list[dict[str, Any]]:
        scripts = {other: job for other, job in ALL.items() if (other in FAST) == (name in FAST)}
        folder = self._folder / str(name in FAST)
        results = ranks.run_ranks(follow_all, 2 * REPLICAS, (scripts, str(folder)), timeout=300)
        self.update({other: [result[other] for result in results] for other in scripts})
        return self[name]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    return Followed(tmp_path_factory.mktemp("jobs"))


def named(prefix, names):
    """The names as parameters of a test, which is slow for some of them."""
    return deepspeed_job.cases(names, {name for name in names if prefix + name not in FAST})


def by_replica(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The results of a replica's stages, for every replica; ranks are numbered replica first."""
    return [results[replica::REPLICAS] for replica in range(REPLICAS)]


@pytest.mark.parametrize("name", named("", JOBS))
def test_replicas_train_as_the_reference(followed, name):
    expected = reference_of(JOBS[name], REPLICAS)
    for results in by_replica(followed[name]):
        deepspeed_job.assert_equal(results, expected)


@pytest.mark.parametrize("name", named("global, ", GLOBAL))
def test_replicas_clipped_globally_train_as_the_reference(followed, name):
    expected = reference_of(GLOBAL[name], REPLICAS)
    for results in by_replica(followed[f"global, {name}"]):
        deepspeed_job.assert_equal(results, expected)


@pytest.mark.parametrize("name", named("global, ", ["tied", "tied, bf16"]))
def test_copies_of_all_replicas_are_equal_at_equal_versions(followed, name):
    copies: dict[tuple[str, int], list[torch.Tensor]] = {}
    for result in followed[f"global, {name}"]:
        for moment in result["moments"]:
            for key in jobs.TIED:
                at = key, moment["stats"]["version"]
                copies.setdefault(at, []).append(moment["weights"][f"tied_modules.{key}.weight"])
    assert all(torch.equal(copy, same[0]) for same in copies.values() for copy in same)
    assert sum(len(same) >= 2 * REPLICAS for same in copies.values()) > len(copies) / 2


def run_and_resume(job: Job, folder: str) -> list[dict[str, Any]]:
    """What a rank does: the whole job with a save on the way, then what comes after the save once more from there."""
    rest = dataclasses.replace(job, script=job.script[2:], first_micro_batch=4 * job.accumulation)
    results = []
    for part in (job, rest):
        engine = deepspeed_job.build(part)
        if part is rest:
            engine.load_checkpoint(folder, tag="common")
        mine = part.of_replica(engine.grid.get_data_parallel_rank())
        results.append(deepspeed_job.follow(engine, mine, folder=folder))
    return results


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replicas_with_tied_weights_resume_exactly(precision, tmp_path):
    """The replicas' pending sums differ, one of them writes the checkpoint: what is saved is their mean."""
    job = Job(
        stages=2,
        accumulation=1,
        script=("train x4", "save", "train x3", "drain"),
        model="tied",
        clip=2.0,
        precision=precision,
    )
    for whole, resumed in ranks.run_ranks(run_and_resume, 2 * REPLICAS, (job, str(tmp_path))):
        for moment, truth in zip(resumed["moments"], whole["moments"][5:], strict=True):
            assert all(torch.equal(moment["weights"][key], value) for key, value in truth["weights"].items())


@pytest.mark.parametrize("name", named("global, ", GLOBAL))
def test_replicas_stay_alike_when_clipped_globally(followed, name):
    first, second = by_replica(followed[f"global, {name}"])
    for one, other in zip(first, second, strict=True):
        for mine, theirs in zip(one["moments"], other["moments"], strict=True):
            assert mine["weights"].keys() == theirs["weights"].keys()
            assert all(torch.equal(mine["weights"][key], theirs["weights"][key]) for key in mine["weights"])
            assert mine["loss"] == theirs["loss"] or mine["loss"] != mine["loss"]


@pytest.mark.parametrize("names", [FAST, pytest.param(ALL.keys() - FAST, marks=pytest.mark.slow)])
def test_collectives_stay_among_the_replicas_of_a_stage(followed, names):
    """Every collective of two steady batches, in all jobs; without ZeRO that is gradients and loss, once each.

    Tied weights have an asynchronous one of their own, in the replica's pipeline.
    """
    for name in names:
        for rank, result in enumerate(followed[name]):
            stage = rank // REPLICAS
            assert result["group"] == [stage * REPLICAS, stage * REPLICAS + 1]
            spans = {tuple(members) for _, members in result["collectives"] if len(members) > 1}
            tied = {(rank % REPLICAS, REPLICAS + rank % REPLICAS)} if "tied" in name else set()
            assert spans == {tuple(result["group"]), *tied}, f"{name}: {spans}"
    for result in followed["fp32"]:
        assert [name for name, members in result["collectives"] if len(members) > 1] == ["allreduce"] * 4


def test_jobs_run_with_the_optimizers_that_their_names_say(followed):
    zero, bf16 = "DeepSpeedZeroOptimizer", "BF16_Optimizer"
    for name, optimizer in [
        ("fp32", "AdamW"),
        ("fp32, ZeRO-1", zero),
        ("bf16", bf16),
        ("bf16 sums", bf16),
        ("bf16 sums, ZeRO-1", zero),
    ]:
        assert {result["optimizer"] for result in followed[name]} == {optimizer}


@pytest.mark.parametrize("precision", ["fp32", "bf16-bf16"])
def test_zero_without_replicas_trains_as_the_reference(precision, tmp_path):
    job = Job(
        stages=3,
        accumulation=2,
        script=MIXED,
        precision=precision,
        clip=0.4,
        optimizer="groups",
        warmup=True,
        config={**ZERO, **BY_STAGE},
    )
    deepspeed_job.assert_as_reference(job, deepspeed_job.run(job, folder=str(tmp_path)))


def test_the_replicas_do_train_on_different_data():
    job = JOBS["fp32"]
    alone, together = reference_of(job), reference_of(job, REPLICAS)
    assert largest_difference(alone, together)[-1] > 1e-3


# ---- ZeRO stage 1, bf16 accumulation, clipping ---------------------------------------------------------------------

LONG = Job(
    stages=2,
    accumulation=3,
    script=("train x30", "drain"),
    precision="bf16-bf16",
    clip=0.4,
    config={**ZERO, **BY_STAGE},
)


def without_zero(job: Job) -> Job:
    """The same as BF16_Optimizer computes it."""
    return dataclasses.replace(job, config=BY_STAGE)


def largest_difference(some: list, others: list) -> list[float]:
    """The largest difference between the weights of two histories, after each action."""
    return [
        max(
            (mine[name].float() - theirs[name].float()).abs().max().item()
            for mine, theirs in zip(one.weights, other.weights, strict=True)
            for name in mine
        )
        for one, other in zip(some, others, strict=True)
    ]


@pytest.fixture(scope="module")
def zero_alone():
    """The reference without replicas."""
    return reference_of(LONG)


def test_zero_with_bf16_sums_and_clipping_is_the_reference(zero_alone):
    deepspeed_job.assert_equal(deepspeed_job.run(LONG), zero_alone)


@pytest.mark.parametrize("schedule", ["stock", "paci"])
def test_stock_zero_differs_from_bf16_optimizer_as_the_reference_does(schedule):
    """One stage, no replicas, no PACI: stock DeepSpeed is the same reference, and as far from the other one."""
    job = dataclasses.replace(LONG, stages=1, script=("train x30",))
    exact, other = reference_of(job), reference_of(without_zero(job))
    deepspeed_job.assert_equal(deepspeed_job.run(job, schedule), exact, counters=schedule == "paci")
    assert largest_difference(exact, other)[-1] > 1e-2


def test_zero_differs_from_bf16_optimizer_since_it_casts_to_fp32_before_it_clips(zero_alone):
    """That one change turns the reference into BF16_Optimizer's, bit for bit; the fp64 norm changes nothing here."""
    other = reference_of(without_zero(LONG))
    scaled_in_bf16 = reference_of(LONG, zero=ZeroArithmetic(scale_dtype=torch.bfloat16))
    assert largest_difference(other, scaled_in_bf16)[-1] == 0.0
    norm_in_fp32 = reference_of(LONG, zero=ZeroArithmetic(norm_dtype=torch.float32))
    assert largest_difference(zero_alone, norm_in_fp32)[-1] == 0.0
    by_batch = largest_difference(zero_alone, other)
    assert by_batch[0] == 0.0 < by_batch[1] < 4e-3 < 1e-1 < by_batch[-1]


def test_a_difference_of_one_last_bit_grows_as_large(zero_alone):
    """clip / norm in place of 1 / (norm / clip) is a last bit of one fp32 number, and ends as far away."""
    by_batch = largest_difference(zero_alone, reference_of(LONG, zero=ZeroArithmetic(reciprocal=False)))
    assert by_batch[1] == 0.0
    assert by_batch[-1] > 1e-1


def test_without_clipping_zero_and_bf16_optimizer_are_equal():
    job = dataclasses.replace(LONG, clip=0.0)
    assert largest_difference(reference_of(job), reference_of(without_zero(job)))[-1] == 0.0

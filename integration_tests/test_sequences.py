"""Random sequences of every public call, from recorded seeds: after each call as the reference, difference 0.

`make soak` runs many more of them, with faults; `testing.sequences` says how a failure is found again.
"""

import math
from functools import cache

import pytest

from paci_schedule.adapters.frameworks import exists
from testing import deepspeed_job, jobs, ranks, resources, sequences, torch_job
from testing.jobs import Job
from testing.reference.deepspeed import Reference
from testing.reference.versions import where_gradients_are_divided

NEWEST = pytest.mark.skipif(where_gradients_are_divided() != "loss", reason="drawn for the newest DeepSpeed")

DEEPSPEED = {(2, seed): 24 for seed in (1, 2, 4)} | {(3, seed): 24 for seed in (101, 102)}
TORCH = {(3, seed): 24 for seed in (0, 2, 4)}
MEGATRON = {(2, seed): 5 for seed in (1, 2, 3)}


@pytest.fixture(scope="module")
def on_deepspeed(tmp_path_factory):
    drawn = {key: sequences.deepspeed_job(key[1], key[0], length) for key, length in DEEPSPEED.items()}
    runs = deepspeed_job.Runs({str(key): job for key, job in drawn.items()}, tmp_path_factory.mktemp("sequences"))
    return lambda key: (drawn[key], runs[str(key)])


@pytest.fixture(scope="module")
def on_torch():
    drawn = {key: sequences.torch_job(key[1], key[0], length) for key, length in TORCH.items()}
    found = cache(lambda: torch_job.run_all(*((job, {}) for job in drawn.values())))
    return lambda key: (drawn[key], found()[list(drawn).index(key)])


@NEWEST
@pytest.mark.parametrize("key", DEEPSPEED, ids="P={0[0]} seed {0[1]}".format)
def test_deepspeed_does_any_sequence_of_calls_as_the_reference(key, on_deepspeed):
    job, results = on_deepspeed(key)
    deepspeed_job.assert_equal(results, Reference(job).run())


@pytest.mark.parametrize("key", TORCH, ids="P={0[0]} seed {0[1]}".format)
def test_torchs_schedule_does_any_sequence_of_calls_as_the_reference(key, on_torch):
    job, results = on_torch(key)
    expected = Reference(job).run()
    for result in results:  # what its calls tell of losses is another thing (test_torch_equivalence)
        for moment, truth in zip(result["moments"], expected, strict=True):
            truth.loss[result["stage"]] = moment["loss"] = math.nan
    deepspeed_job.assert_equal(results, expected)


def test_megatron_does_any_sequence_of_calls_as_the_reference():
    if not exists("megatron.core"):
        pytest.skip("megatron-core is not installed")
    from integration_tests.megatron_checks import assert_equal
    from testing.megatron_job import train_all
    from testing.reference import megatron

    drawn = [sequences.gpt_job(seed, stages, calls) for (stages, seed), calls in MEGATRON.items()]
    found = list(zip(*ranks.run_ranks(train_all, 2, (drawn,)), strict=True))
    [expected] = ranks.run_ranks(megatron.train_all, 1, (drawn,))
    for job, by_stage, truths in zip(drawn, found, expected, strict=True):
        for stage, (got, truth) in enumerate(zip(by_stage, truths, strict=True)):
            assert_equal(got.weights, truth.weights, f"{job}, stage {stage}, weight")
            assert got.norms == truth.norms, (job, stage)
            assert got.losses == (truth.losses if stage == job.stages - 1 else [[]] * job.calls), (job, stage)
            assert got.stats["backwards"] == len(truth.drift), (job, stage)


# ---- nothing grows ---------------------------------------------------------------------------------------------------

ROUND = ("train x4", "eval", "train x2", "save", "load", "train", "drain", "reset", "schedule=1f1b", "train",
         "schedule=paci", "accumulate=3", "train x2", "accumulate=2")  # fmt: skip


def measured(job, folder):
    """What a rank holds after every round of calls."""
    engine, feed, readings = deepspeed_job.build(job), jobs.data(job.model, shapes=job.shapes), []
    for _ in range(12):
        for action in job.actions():
            deepspeed_job.act(engine, job, action, feed, folder)
        readings.append(resources.held())
    return readings


def test_nothing_grows_from_call_to_call(tmp_path):
    """Memory, files, threads and shared memory, as `testing.resources` states it, with everything that is deferred."""
    job = Job(
        stages=2,
        accumulation=2,
        script=ROUND,
        model="tied",
        clip=2.5,
        warmup=True,
        shapes=((3, 5), (2, 3)),
        config={"paci": {"prediction": "window", "record": str(tmp_path / "records")}},
    )
    for rank, readings in enumerate(ranks.run_ranks(measured, 2, (job, str(tmp_path / "saved")), timeout=200)):
        resources.assert_flat(readings, f"rank {rank}")


def test_what_grows_is_seen():
    flat = [resources.Held(memory=100 << 20, files=9, threads=4, shared=0)] * 12
    resources.assert_flat(flat, "flat")
    for name, step in (("memory", 1 << 20), ("files", 1), ("threads", 1), ("shared", 4096)):
        grown = [each._replace(**{name: getattr(each, name) + step * at}) for at, each in enumerate(flat)]
        with pytest.raises(AssertionError, match=f"rank 1: {name} grew"):
            resources.assert_flat(grown, "rank 1")

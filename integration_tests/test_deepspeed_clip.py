"""Global clipping by carried norms: the engine clips by exactly the norms that the written rule names."""

import dataclasses
import math
from unittest import mock

import pytest

from integration_tests.test_deepspeed_collectives import spanning, steady_calls
from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference.deepspeed import Reference
from testing.reference.versions import where_gradients_are_divided

MIXED = ("train x3", "drain", "train x2", "eval", "train", "drain", "drain", "train x4", "save", "train x3")
ZERO_1 = {
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000},
    "zero_allow_untested_optimizer": True,
}
SWITCHES = ("train x3", "schedule=1f1b", "train x2", "schedule=paci", "train x3", "drain")
STAGE = {"paci": {"clip": "stage"}}

JOBS = {
    "P=2 a=1": Job(stages=2, accumulation=1, script=MIXED, clip=0.9),
    "P=2 a=3": Job(stages=2, accumulation=3, script=MIXED, clip=0.6, warmup=True),
    "P=3 a=1": Job(stages=3, accumulation=1, script=MIXED, clip=0.9, optimizer="sgd"),
    "P=3 a=2": Job(stages=3, accumulation=2, script=MIXED, clip=0.7, optimizer="groups"),
    "P=3 a=5": Job(stages=3, accumulation=5, script=("train x3", "eval", "train x2", "drain"), clip=0.5),
    "P=4 a=1": Job(stages=4, accumulation=1, script=MIXED, clip=0.9),
    "P=4 a=2": Job(stages=4, accumulation=2, script=MIXED, clip=0.7, warmup=True),
    "P=4 a=3": Job(stages=4, accumulation=3, script=("train x4", "drain", "train x3"), clip=0.6),
    "a stage without parameters": Job(stages=3, accumulation=2, script=MIXED, model="hollow", clip=0.4),
    "a stage without parameters, bf16": Job(
        stages=3, accumulation=2, script=MIXED, model="hollow", clip=0.4, precision="bf16"
    ),
    "a frozen stage": Job(stages=3, accumulation=2, script=SWITCHES, model="frozen", clip=0.6),
    "a frozen stage, bf16 sums, ZeRO-1": Job(
        stages=3, accumulation=2, script=SWITCHES, model="frozen", clip=0.6, precision="bf16-bf16", config=ZERO_1
    ),
    "a frozen stage, bf16": Job(stages=3, accumulation=2, script=SWITCHES, model="frozen", clip=0.6, precision="bf16"),
    "accumulation changes": Job(
        stages=3,
        accumulation=2,
        clip=0.6,
        script=("train x3", "accumulate=5", "train x2", "accumulate=1", "train x4", "drain"),
    ),
    "bf16": Job(stages=3, accumulation=2, script=MIXED, clip=0.7, precision="bf16", warmup=True),
    "bf16, two optimizer groups": Job(
        stages=4,
        accumulation=3,
        script=("train x4", "eval", "train x2"),
        clip=0.6,
        precision="bf16",
        optimizer="groups",
    ),
    "bf16 sums": Job(stages=2, accumulation=3, script=MIXED, clip=0.6, precision="bf16-bf16"),
    "bf16 sums, ZeRO-1": Job(stages=2, accumulation=3, script=MIXED, clip=0.6, precision="bf16-bf16", config=ZERO_1),
    "offload": Job(
        stages=2,
        accumulation=3,
        script=MIXED,
        clip=0.6,
        precision="bf16-bf16",
        config={
            "zero_optimization": {**ZERO_1["zero_optimization"], "offload_optimizer": {"device": "cpu"}},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    ),
    "tuples": Job(stages=2, accumulation=2, script=MIXED, clip=1.4, model="pairs"),
    "by stage": Job(stages=3, accumulation=2, script=MIXED, clip=0.4, config=STAGE),
    "by stage, bf16": Job(stages=3, accumulation=2, script=MIXED, clip=0.4, precision="bf16", config=STAGE),
    "slack": Job(stages=3, accumulation=2, script=MIXED, clip=0.6, config={"paci": {"extra_in_flight": [2, 1]}}),
    "overflow of one stage": Job(
        stages=3,
        accumulation=2,
        script=("train x5", "drain", "train"),
        clip=0.7,
        warmup=True,
        precision="bf16",
        poison=(1, 5, 0),  # in update 2
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return deepspeed_job.Runs(JOBS, tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("name", JOBS)
def test_the_engine_clips_as_the_reference(name, runs):
    factors = deepspeed_job.assert_as_reference(JOBS[name], runs[name]).factors()
    if where_gradients_are_divided() == "loss":  # for which the limits are chosen
        assert min(factors) < 1 < max(factors), "some updates shall be clipped, and some not"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-bf16", "bf16-bf16, ZeRO-1"])
@pytest.mark.parametrize("model", ["words", "tied"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_engine_clips_as_the_reference_everywhere(stages, model, precision, tmp_path):
    precision, _, zero = precision.partition(", ")
    everywhere = [
        Job(
            stages=stages,
            accumulation=accumulation,
            script=MIXED,
            model=model,
            precision=precision,
            clip=0.7 if model == "words" else 2.5,
            warmup=True,
            config=ZERO_1 if zero else {},
        )
        for accumulation in range(1, 9)
    ]
    calls = [(job, "paci", {"folder": str(tmp_path / str(job.accumulation))}) for job in everywhere]
    for job, results in zip(everywhere, deepspeed_job.run_all(*calls), strict=True):
        deepspeed_job.assert_as_reference(job, results)


@pytest.mark.parametrize(
    ("stages", "accumulation", "extra"), [(2, 1, 0), (2, 3, 1), (3, 1, 2), (3, 2, 0), (4, 1, 0), (4, 3, 2), (6, 4, 0)]
)
def test_the_reference_uses_the_norms_of_the_closed_form(stages, accumulation, extra):
    """v - 1 of later stages, v - ceil((d_r - d_s + 1) / a) of earlier ones, or the last before the pipe was empty.

    In a drain, what the last activation told of earlier ones.
    """
    before, after = 2, 8
    reference = Reference(
        Job(
            stages=stages,
            accumulation=accumulation,
            clip=0.5,
            config={"paci": {"extra_in_flight": extra}},
            script=(f"train x{before}", "drain", f"train x{after}"),
        )
    )
    reference.run()
    seen = set()
    for (stage, update, other), used in reference.pipeline.used.items():
        behind = [reference.pipeline.ahead[number] for number in (stage, other)]
        delay = 1 if other > stage else math.ceil((behind[1] - behind[0] + 1) / accumulation)
        emptied = before if update >= before else 0
        taken = (after if emptied else before) * accumulation
        if other > stage or (update - emptied + 1) * accumulation + behind[0] <= taken:
            assert used == max(emptied - 1, update - delay)
            seen.add((stage, update, other))
        else:
            assert used == emptied + max(0, taken - 1 - behind[1]) // accumulation - 1
    assert len({(stage, other) for stage, update, other in seen if update > before}) == stages * (stages - 1)


def test_an_overflow_elsewhere_counts_as_nothing_and_skips_one_update_of_one_stage(runs):
    """The norm of a stage that overflowed reaches the others as infinite; they go on as if it were zero."""
    results, job = runs["overflow of one stage"], JOBS["overflow of one stage"]
    clean = Reference(dataclasses.replace(job, poison=None)).run()
    assert results[0]["moments"][5]["action"] == "drain"
    rates = [result["moments"][5]["rate"] for result in results]
    assert rates[0] == rates[2] != rates[1]  # the learning rate of the stage that skipped is one update behind
    for stage, result in enumerate(results):
        assert all(value.isfinite().all() for value in result["moments"][-1]["weights"].values())
        differs = any(
            (value != clean[-1].weights[stage][name]).any() for name, value in result["moments"][-1]["weights"].items()
        )
        assert differs


# ---- against other runs of engines -----------------------------------------------------------------------------------

FLUSHED = {
    # Of the stages but the first, stock counts in fp32 only what is marked as a slice, slice or not.
    "fp32, marked": Job(stages=3, accumulation=2, script=("train x4", "eval", "train x2"), clip=0.7, marked=True),
    "bf16": Job(
        stages=3,
        accumulation=2,
        script=("train x4", "eval", "train x2"),
        clip=0.7,
        precision="bf16",
        optimizer="groups",
    ),
    "bf16 sums": Job(stages=3, accumulation=3, script=("train x3",), clip=0.6, precision="bf16-bf16"),
    "bf16 sums, ZeRO-1": Job(
        stages=2, accumulation=3, script=("train x4",), clip=0.6, precision="bf16-bf16", config=ZERO_1
    ),
    "fp32, no clipping": Job(stages=2, accumulation=3, script=("train x4",)),
}
UNCLIPPED = {
    "fp32": Job(stages=3, accumulation=2, script=MIXED),
    "bf16": Job(stages=2, accumulation=2, script=MIXED, precision="bf16"),
}


def in_1f1b(job):
    return dataclasses.replace(job, script=("schedule=1f1b", *job.script))


def drained(job):
    return dataclasses.replace(job, script=("train", "drain") * 4)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    calls = {}
    for name, job in FLUSHED.items():
        calls[f"{name}: 1f1b"], calls[f"{name}: stock"] = in_1f1b(job), (job, "stock")
    marked = FLUSHED["fp32, marked"]
    calls["flush_warmup_steps"] = dataclasses.replace(marked, config={"paci": {"flush_warmup_steps": 100}})
    calls["fp32, not marked: stock"] = dataclasses.replace(marked, marked=False), "stock"
    for name, job in UNCLIPPED.items():
        calls[f"{name}: none"] = job
        calls[f"{name}: huge"] = dataclasses.replace(job, clip=1e9)
        calls[f"{name}: drained"] = drained(job)
        calls[f"{name}: flushed"] = dataclasses.replace(job, script=("train x4",)), "stock"
    return deepspeed_job.Runs(calls, tmp_path_factory.mktemp("pairs"))


def assert_same_weights(results, others, step=1, skip=0):
    """Moments `skip`, `skip` + `step`, ... of the one as all moments of the other."""
    for result, other in zip(results, others, strict=True):
        for moment, truth in zip(result["moments"][skip::step], other["moments"], strict=True):
            for name, value in truth["weights"].items():
                assert (moment["weights"][name] == value).all(), f"{name} of stage {result['stage']}"


@pytest.mark.parametrize("name", FLUSHED)
def test_in_1f1b_mode_the_engine_clips_as_stock_does(name, pairs):
    mine, stock = pairs[f"{name}: 1f1b"], pairs[f"{name}: stock"]
    assert_same_weights(mine, stock, skip=1)
    if FLUSHED[name].clip and FLUSHED[name].precision != "fp32":  # stock does not tell in fp32
        for result, other in zip(mine, stock, strict=True):
            assert norms_of(result)[1:] == norms_of(other)


def test_in_the_flushed_warm_up_the_engine_clips_as_stock_does(pairs):
    assert_same_weights(pairs["flush_warmup_steps"], pairs["fp32, marked: stock"])


def test_stock_clips_fp32_by_the_norm_of_its_first_stage(pairs):
    """Nothing but what is counted changes with the mark, and it changes the weights."""
    with pytest.raises(AssertionError, match="of stage"):
        assert_same_weights(pairs["fp32, not marked: stock"], pairs["fp32, marked: stock"])


@pytest.mark.parametrize("name", UNCLIPPED)
def test_a_limit_that_is_never_reached_changes_nothing(name, pairs):
    assert_same_weights(pairs[f"{name}: huge"], pairs[f"{name}: none"])


@pytest.mark.parametrize("name", UNCLIPPED)
def test_drained_after_every_batch_the_engine_is_stock(name, pairs):
    assert_same_weights(pairs[f"{name}: drained"], pairs[f"{name}: flushed"], skip=1, step=2)


def norms_of(result):
    """The gradient norm after every action."""
    return [moment["norm"] for moment in result["moments"]]


def assert_same_norms(norms, others):
    """The norms are equal to the bit from the first update of a process on; a checkpoint holds no earlier norm."""
    updated = [not math.isnan(norm) for norm in norms]
    assert updated == sorted(updated)
    assert sum(updated) >= len(norms) - 2
    assert [norm for norm, ever in zip(norms, updated, strict=True) if ever] == others[-sum(updated) :]


# ---- checkpoints and collectives -------------------------------------------------------------------------------------

RESUMED = {
    "fp32": Job(stages=3, accumulation=2, clip=0.6, script=("train x4", "save", "train x3", "drain")),
    "bf16": Job(stages=3, accumulation=1, clip=0.8, script=("train x4", "save", "train x3", "drain"), precision="bf16"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_carried_norms_travel_with_a_checkpoint(name, tmp_path):
    job = RESUMED[name]
    rest = dataclasses.replace(job, script=job.script[2:], first_micro_batch=4 * job.accumulation)
    whole, resumed = deepspeed_job.run_resumed(job, rest, tmp_path)
    deepspeed_job.assert_as_reference(job, whole)
    for result, other in zip(resumed, whole, strict=True):
        assert_same_norms(norms_of(result), norms_of(other)[5:])
    assert_same_weights(whole, resumed, skip=5)


@pytest.mark.parametrize(
    "job",
    [
        Job(stages=3, accumulation=2, script=(), clip=0.3),
        Job(stages=3, accumulation=2, script=(), clip=0.3, precision="bf16", optimizer="groups"),
    ],
    ids=["fp32", "bf16"],
)
def test_no_collective_spans_stages(job):
    assert not spanning(ranks.run_ranks(steady_calls, 3, (job, "paci", 3, 4)))


def groups_of_all_reduce(job):
    """Ranks of the groups that torch.distributed.all_reduce is called with in a steady batch."""
    import torch.distributed as dist

    engine = deepspeed_job.build(job)
    feed = jobs.data(job.model)
    engine.train_batch(feed)
    all_reduce = dist.all_reduce
    seen = []

    def listening(tensor, *args, group, **kwargs):
        seen.append(dist.get_process_group_ranks(group))
        return all_reduce(tensor, *args, group=group, **kwargs)

    with mock.patch.object(dist, "all_reduce", listening):
        engine.train_batch(feed)
    return seen


def test_who_asks_a_norm_s_group_for_its_ranks_hears_of_this_stage_alone():
    job = Job(stages=2, accumulation=2, script=(), clip=0.3, precision="bf16")
    for rank, seen in enumerate(ranks.run_ranks(groups_of_all_reduce, 2, (job,))):
        assert seen
        assert all(group == [rank] for group in seen)

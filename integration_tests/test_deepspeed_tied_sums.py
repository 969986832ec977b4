"""Sums of tied weights on their way: under a flush, in checkpoints, in steady state, and where they cannot be."""

import dataclasses
import traceback
from unittest import mock

import pytest

from integration_tests.test_deepspeed_clip import assert_same_norms, norms_of
from integration_tests.test_deepspeed_collectives import recorded
from integration_tests.test_deepspeed_tied import JOBS, tied
from paci_schedule.errors import UnsupportedError
from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference import deepspeed as reference
from testing.reference import versions

FLUSHED = {
    model: Job(stages=3, accumulation=2, script=("train x4",), model=model, precision=precision, clip=clip)
    for model, clip, precision in [("tied", 2.5, "bf16"), ("thrice", 0.6, "bf16"), ("still", 0.0, "fp32")]
}


@pytest.mark.parametrize("model", FLUSHED)
def test_flushed_after_every_batch_the_engine_is_stock(model, on_three):
    """In 1F1B mode every sum is applied at once, as stock DeepSpeed does."""
    for result, other in (results[model] for results in on_three):
        assert not FLUSHED[model].clip or norms_of(result)[1:] == norms_of(other)
        for moment, truth in zip(result["moments"][1:], other["moments"], strict=True):
            assert all((moment["weights"][name] == value).all() for name, value in truth["weights"].items())


RESUMED = {
    name: dataclasses.replace(JOBS[name], script=("train x4", "save", "train x3", "drain"))
    for name in ("P=3 a=1", "bf16, clipping")
}


@pytest.mark.parametrize("name", RESUMED)
def test_pending_sums_travel_with_a_checkpoint(name, on_three):
    job = RESUMED[name]
    deepspeed_job.assert_as_reference(job, [results[name][0] for results in on_three])
    for whole, resumed in (results[name] for results in on_three):
        if job.clip:
            assert_same_norms(norms_of(resumed), norms_of(whole)[5:])
        for moment, truth in zip(resumed["moments"], whole["moments"][5:], strict=True):
            assert all((moment["weights"][key] == value).all() for key, value in truth["weights"].items())


WEIGHTS_ALONE = pytest.mark.skipif(not versions.loads_weights_alone(), reason="this DeepSpeed fails, under 1F1B too")


def go_on(job, folder, *, loads):
    """Four batches; with `loads`, only the weights from a checkpoint of stock's, then nothing; three more batches."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    engine = deepspeed_job.build(job)
    feed = jobs.data(job.model)
    for _ in range(4):
        engine.train_batch(feed)
    engine.drain()
    if loads:
        PipelineEngine.save_checkpoint(engine, folder, "bare")
        engine.load_checkpoint(folder, "bare", load_module_only=True)
        assert engine.load_checkpoint(f"{folder}/nothing") == (None, None)
    for _ in range(3):
        engine.train_batch(feed)
    engine.drain()
    return deepspeed_job.weights(engine), float(engine.get_global_grad_norm())


@WEIGHTS_ALONE
def test_loading_weights_only_keeps_pending_sums_and_norms(on_three):
    for (weights, norm), (others, other) in (results["weights only"] for results in on_three):
        assert norm == other
        assert all((weights[name] == value).all() for name, value in others.items())


def load_untied(job, folder):
    """The checkpoint of a model three of whose layers share a matrix, where the last of them has one of its own."""
    layers = jobs.layers(job.model, deepspeed_job.tied_spec)
    layers[10] = jobs.Shared("square")
    engine = deepspeed_job.build(job, layers=layers)
    engine.load_checkpoint(folder, "common")
    return [tied.pending() for tied in engine._ties.gradients.values()]


def test_sums_of_ties_between_other_stages_are_dropped_with_a_word(on_three):
    for rank, results in enumerate(on_three):
        assert results["untied"] == ([[]] if rank < 2 else [])
        assert "dropped, no such tie here: square.weight of stages [0, 1, 2] of 3" in results["output"]


def load_weights(job, folder):
    engine = deepspeed_job.build(job)
    engine.load_checkpoint(folder, "common", load_module_only=True)
    return deepspeed_job.weights(engine), engine.train_batch(jobs.data(job.model)).item()


@WEIGHTS_ALONE
def test_the_weights_alone_load_where_nothing_is_tied_across_stages(tmp_path):
    """One rank loads the weights that two have saved."""
    job = dataclasses.replace(JOBS["P=2 a=1"], script=("train x3", "save"))
    saved = [result["moments"][-1]["weights"] for result in deepspeed_job.run(job, folder=str(tmp_path))]
    [(weights, loss)] = ranks.run_ranks(load_weights, 1, (dataclasses.replace(job, stages=1), str(tmp_path)))
    assert weights.keys() == saved[0].keys() | saved[1].keys()
    assert all((weights[name] == value).all() for stage in saved for name, value in stage.items())
    assert loss == loss


BY_STAGE = tied(stages=3, accumulation=2, clip=0.5, script=("train", "drain"), config={"paci": {"clip": "stage"}})


def clip_by_stage():
    """What the engine says about clipping by stage, and the loss of a batch that is not clipped."""
    with pytest.raises(UnsupportedError) as error:
        deepspeed_job.build(BY_STAGE)
    unclipped = deepspeed_job.train(dataclasses.replace(BY_STAGE, clip=0.0))
    return str(error.value), unclipped["moments"][0]["loss"]


def test_clipping_by_stage_would_part_the_copies_and_is_refused(on_three):
    for said, loss in (results["by stage"] for results in on_three):
        for words in ('"clip": "stage"', '"gradient_clipping": 0.5', "square, words", 'use "clip": "global"'):
            assert words in said
        assert loss > 0


@pytest.mark.parametrize(
    ("model", "schedule", "error", "says"),
    [
        pytest.param("still", "stock", "AttributeError", "_hp_grad", marks=pytest.mark.slow),
        ("deaf", "paci", "UnsupportedError", "square.weight of stages"),
    ],
    ids=["stock, frozen", "a copy without a gradient"],
)
def test_ties_that_bf16_cannot_train_fail_at_once(model, schedule, error, says):
    """BF16_Optimizer sums no gradients of a weight that gets none; stock 0.19.8 reads the sum of a frozen one, too."""
    job = Job(stages=3, accumulation=2, script=("train x9",), model=model, precision="bf16")
    outcomes = ranks.gather_outcomes(deepspeed_job.train, 3, (job, schedule), timeout=60)
    [failed] = [outcome for outcome in outcomes if outcome.raised[:1] == (error,)][:1]
    assert says in failed.error
    assert all(outcome.ended == "raised" for outcome in outcomes)


# ---- nothing waits ---------------------------------------------------------------------------------------------------


class _Watched:
    """The handle of an asynchronous all-reduce; tells when it is waited for."""

    def __init__(self, work, waited):
        self._work, self._waited = work, waited

    def wait(self):
        self._waited()
        return self._work.wait()


def watch_steady_calls(job, warm_up, count):
    """What a stage does in steady state about the sums of its tied weights.

    Returns:
        collectives: those that span stages, with who started them;
        waits: (number of the sum, of its weight, update at which it is waited for);
        posted: (call, number of the sum, shape) in the order of posting;
        updates: that were done.
    """
    import torch.distributed as dist

    engine = deepspeed_job.build(job)
    feed = jobs.data(job.model)
    posted, waits, callers, call = [], [], [], 0
    all_reduce = dist.all_reduce

    def watched(tensor, *args, async_op=False, **kwargs):
        work = all_reduce(tensor, *args, async_op=async_op, **kwargs)
        if not async_op:
            return work
        shape = tuple(tensor.shape)
        number = sum(other == shape for _, _, other in posted)
        posted.append((call, number, shape))
        return _Watched(work, lambda: waits.append((number, engine.global_steps)))

    def keep(name, members):
        if len(members) > 1:
            callers.append((name, members, [frame.name for frame in traceback.extract_stack()]))

    with mock.patch.object(dist, "all_reduce", watched):
        for _ in range(warm_up):
            engine.train_batch(feed)
            call += 1
        waits.clear()
        first = engine.global_steps
        with recorded(keep):
            for _ in range(count):
                engine.train_batch(feed)
                call += 1
    return {"collectives": callers, "waits": waits, "posted": posted, "updates": engine.global_steps - first}


WATCHED = {
    "fp32, clipping": tied(stages=3, accumulation=1, script=(), clip=0.3),
    "bf16": tied(stages=3, accumulation=2, script=(), precision="bf16"),
}


@pytest.mark.parametrize("name", WATCHED)
def test_only_the_tied_sums_span_stages_and_nobody_waits_for_them_early(name, on_three):
    """One all-reduce for each tied weight and update, waited for j updates after it; all copies post it in one call."""
    job = WATCHED[name]
    pipeline = reference.Reference(job).pipeline
    watched = [results[f"watched, {name}"] for results in on_three]
    for stage, result in enumerate(watched):
        here = [key for key in jobs.TIED if stage in job.holders(key)]
        assert len(result["collectives"]) == len(here) * result["updates"] > (0 if here else -1)
        for name, members, callers in result["collectives"]:
            assert name == "allreduce"
            assert members == [0, 2]
            assert "post_sum" in callers
        assert len(result["waits"]) == len(here) * result["updates"]
        assert {waited - number for number, waited in result["waits"]} == {pipeline.tied_delay(key) for key in here}
    assert sorted(watched[0]["posted"]) == sorted(watched[2]["posted"])


# ---- jobs of three ranks, one after the other ------------------------------------------------------------------------


def on_three_ranks(folder):
    results = {}
    for model, job in FLUSHED.items():
        mine = dataclasses.replace(job, script=("schedule=1f1b", *job.script))
        results[model] = deepspeed_job.train(mine), deepspeed_job.train(job, "stock")
    for name, job in RESUMED.items():
        at = f"{folder}/{name}"
        rest = dataclasses.replace(job, script=job.script[2:], first_micro_batch=4 * job.accumulation)
        results[name] = deepspeed_job.train(job, folder=at), deepspeed_job.train(rest, folder=at, load=True)
    if versions.loads_weights_alone():
        job = JOBS["clipping"]
        results["weights only"] = [go_on(job, f"{folder}/weights", loads=loads) for loads in (False, True)]
    thrice = dataclasses.replace(JOBS["thrice"], script=("train x3", "save"))
    deepspeed_job.train(thrice, folder=folder)
    results["untied"] = load_untied(thrice, folder)
    results["by stage"] = clip_by_stage()
    for name, job in WATCHED.items():
        results[f"watched, {name}"] = watch_steady_calls(job, 4, 4)
    return results


@pytest.fixture(scope="module")
def on_three(tmp_path_factory):
    """By rank, what it found, and what it wrote."""
    folder = str(tmp_path_factory.mktemp("three"))
    outcomes = ranks.gather_outcomes(on_three_ranks, 3, (folder,), timeout=280, grace=2)
    assert all(outcome.ended == "returned" for outcome in outcomes), outcomes
    return [{**outcome.value, "output": outcome.output} for outcome in outcomes]

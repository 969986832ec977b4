"""Tied weights: the sum of the copies' gradients arrives a fixed number of updates late, and the copies stay one."""

import dataclasses
import traceback
from unittest import mock

import pytest
import torch

from integration_tests.test_deepspeed_clip import assert_same_norms, norms_of
from integration_tests.test_deepspeed_collectives import recorded
from paci_schedule.runtime.deferred.tied import drop_overflow
from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference import deepspeed as reference
from testing.reference import versions

MIXED = ("train x3", "drain", "train x2", "eval", "train", "drain", "drain", "train x4", "save", "train x3")
ZERO_1 = {
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000},
    "zero_allow_untested_optimizer": True,
}
SWITCHES = ("train x3", "schedule=1f1b", "train x2", "schedule=paci", "train x3", "drain")
ACCUMULATIONS = ("train x4", "accumulate=5", "train x2", "accumulate=1", "train x5", "drain")


def tied(**options):
    return Job(model="tied", **options)


def overflowing(number=3, **options):
    """A gradient of stage 0 is infinite in its update 2; parameters 0 and 1 are tied."""
    return tied(**{"stages": 2, "accumulation": 1, "script": MIXED, "poison": (0, 2, number), **options})


JOBS = {
    "P=2 a=1": tied(stages=2, accumulation=1, script=MIXED),
    "P=2 a=3": tied(stages=2, accumulation=3, script=MIXED, optimizer="groups", warmup=True),
    "P=3 a=1": tied(stages=3, accumulation=1, script=MIXED, optimizer="sgd"),
    "P=3 a=2": tied(stages=3, accumulation=2, script=MIXED),
    "P=3 a=5": tied(stages=3, accumulation=5, script=("train x3", "eval", "train x2", "drain")),
    "P=4 a=1": tied(stages=4, accumulation=1, script=MIXED),
    "P=4 a=2, clipping": tied(stages=4, accumulation=2, script=MIXED, clip=2.5),
    "P=4 a=3": tied(stages=4, accumulation=3, script=("train x4", "drain", "train x3")),
    "clipping": tied(stages=3, accumulation=1, script=MIXED, clip=3.0),
    "bf16, clipping": tied(stages=3, accumulation=2, script=MIXED, precision="bf16", clip=2.5, warmup=True),
    "bf16": tied(stages=2, accumulation=1, script=MIXED, precision="bf16"),
    "bf16 sums": tied(stages=2, accumulation=3, script=MIXED, precision="bf16-bf16", clip=2.0),
    "bf16 sums, ZeRO-1": tied(stages=2, accumulation=3, script=MIXED, precision="bf16-bf16", clip=2.0, config=ZERO_1),
    "a flush on the way": tied(stages=3, accumulation=1, script=SWITCHES),
    "a flush on the way, clipping": tied(stages=2, accumulation=1, script=SWITCHES, clip=3.0),
    "accumulation changes": tied(stages=3, accumulation=2, script=ACCUMULATIONS),
    "accumulation changes, clipping": tied(stages=3, accumulation=2, script=ACCUMULATIONS, clip=2.0),
    "thrice": Job(stages=3, accumulation=1, script=MIXED, model="thrice", optimizer="sgd"),
    "thrice, clipping": Job(stages=3, accumulation=2, script=MIXED, model="thrice", optimizer="sgd", clip=0.6),
    "thrice, bf16, clipping": Job(stages=4, accumulation=2, script=MIXED, model="thrice", clip=0.6, precision="bf16"),
    "a stage of copies, clipping": Job(stages=3, accumulation=2, script=MIXED, model="copies", clip=0.5),
    "a stage of copies, bf16": Job(
        stages=3, accumulation=1, script=SWITCHES, model="copies", clip=0.5, precision="bf16"
    ),
    "frozen, clipping": Job(stages=3, accumulation=2, script=MIXED, model="still", clip=1.0),
    "frozen, bf16": Job(stages=2, accumulation=1, script=SWITCHES, model="still", precision="bf16"),
    "frozen, bf16 sums": Job(stages=2, accumulation=3, script=MIXED, model="still", precision="bf16-bf16", clip=1.0),
    "a copy without a gradient": Job(stages=3, accumulation=2, script=SWITCHES, model="deaf", optimizer="sgd"),
    "a copy without a gradient, ZeRO-1": Job(
        stages=3, accumulation=1, script=MIXED, model="deaf", clip=0.6, precision="bf16-bf16", config=ZERO_1
    ),
    "slack": tied(stages=3, accumulation=2, script=MIXED, clip=3.0, config={"paci": {"extra_in_flight": 3}}),
    "overflow, fp32, clipping": overflowing(clip=2.0),
    "overflow, bf16": overflowing(precision="bf16"),
    "overflow, bf16, clipping": overflowing(precision="bf16", clip=2.0, warmup=True),
    "overflow, bf16 sums": overflowing(precision="bf16-bf16"),
    "overflow, bf16 sums, ZeRO-1": overflowing(precision="bf16-bf16", config=ZERO_1, clip=2.0),
    "overflow under a flush, bf16": overflowing(precision="bf16", script=("schedule=1f1b", *MIXED)),
    "overflow of a tied weight, bf16": overflowing(0, precision="bf16", warmup=True),
    "overflow of a tied weight, bf16, clipping": overflowing(0, precision="bf16", clip=2.0),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return deepspeed_job.Runs(JOBS, tmp_path_factory.mktemp("tied"))


@pytest.mark.parametrize("name", JOBS)
def test_the_engine_ties_as_the_reference(name, runs):
    # Three numbers have several sums: the process group chooses one, the same for all of its ranks.
    rounding = 1e-5 if JOBS[name].model == "thrice" else 0.0
    truth = deepspeed_job.assert_as_reference(JOBS[name], runs[name], rounding=rounding)
    if JOBS[name].clip:
        assert min(truth.factors()) < 1


@pytest.mark.parametrize("name", JOBS)
def test_copies_at_equal_versions_are_equal_to_the_bit(name, runs):
    """The copies of one version are compared, at whatever moments their stages stand at it, in steady state too."""
    seen, compared = {}, set()
    for result in runs[name]:
        for moment in result["moments"]:
            for key in jobs.TIES[JOBS[name].model]:
                weight = moment["weights"].get(f"tied_modules.{key}.weight")
                if weight is not None:
                    version = moment["stats"]["version"]
                    stage, copy = seen.setdefault((key, version), (result["stage"], weight))
                    assert (copy == weight).all(), f"{key} of stages {stage}, {result['stage']} at version {version}"
                    compared |= {(key, version)} if stage != result["stage"] else set()
    batches = sum(moment["action"] == "train" for moment in runs[name][0]["moments"])
    if JOBS[name].script[-1] == "drain":
        assert {(key, batches) for key in jobs.TIES[JOBS[name].model]} <= compared
    assert len(compared) > batches / 2


@pytest.mark.parametrize(
    ("stages", "accumulation", "words", "square"),
    [(2, 1, 1, 1), (3, 1, 2, 2), (3, 2, 1, 1), (4, 1, 3, 1), (4, 2, 2, 1)],
)
def test_the_first_updates_apply_no_gradient_to_a_tied_weight(stages, accumulation, words, square):
    """j = ceil((d_first - d_last) / a); by plain SGD, so that a zero gradient moves nothing."""
    job = tied(stages=stages, accumulation=accumulation, optimizer="sgd", script=("train", "drain") * (words + 1))
    truth = reference.Reference(job)
    assert {key: truth.pipeline.tied_delay(key) for key in jobs.TIED} == {"words": words, "square": square}
    start = {key: jobs.Shared(key).weight for key in jobs.TIED}
    for moment in truth.run()[1::2]:
        version = moment.version[0]
        for key, delay in (("words", words), ("square", square)):
            for stage in job.holders(key):
                still = (moment.weights[stage][f"tied_modules.{key}.weight"] == start[key]).all()
                assert still == (version <= delay)


@pytest.mark.parametrize(
    ("model", "clip", "precision"), [("tied", 2.5, "bf16"), ("thrice", 0.6, "bf16"), ("still", 0.0, "fp32")]
)
def test_flushed_after_every_batch_the_engine_is_stock(model, clip, precision):
    """In 1F1B mode every sum is applied at once, as stock DeepSpeed does."""
    job = Job(stages=3, accumulation=2, script=("train x4",), model=model, precision=precision, clip=clip)
    mine, stock = deepspeed_job.run_all(
        (dataclasses.replace(job, script=("schedule=1f1b", *job.script)), "paci", {}), (job, "stock", {})
    )
    for result, other in zip(mine, stock, strict=True):
        assert not clip or norms_of(result)[1:] == norms_of(other)
        for moment, truth in zip(result["moments"][1:], other["moments"], strict=True):
            assert all((moment["weights"][name] == value).all() for name, value in truth["weights"].items())


@pytest.mark.parametrize("name", ["P=3 a=1", "bf16, clipping", "thrice, bf16, clipping"])
def test_pending_sums_travel_with_a_checkpoint(name, tmp_path):
    job = dataclasses.replace(JOBS[name], script=("train x4", "save", "train x3", "drain"))
    rest = dataclasses.replace(job, script=job.script[2:], first_micro_batch=4 * job.accumulation)
    whole, resumed = deepspeed_job.run_resumed(job, rest, tmp_path)
    deepspeed_job.assert_as_reference(job, whole)
    for result, other in zip(resumed, whole, strict=True):
        if job.clip:
            assert_same_norms(norms_of(result), norms_of(other)[5:])
        for moment, truth in zip(result["moments"], other["moments"][5:], strict=True):
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


def go_on_both_ways(job, folder):
    return [go_on(job, folder, loads=loads) for loads in (False, True)]


@WEIGHTS_ALONE
def test_loading_weights_only_keeps_pending_sums_and_norms(tmp_path):
    job = dataclasses.replace(JOBS["clipping"], script=())
    for (weights, norm), (others, other) in ranks.run_ranks(go_on_both_ways, 3, (job, str(tmp_path))):
        assert norm == other
        assert all((weights[name] == value).all() for name, value in others.items())


def load_untied(job, folder):
    """The checkpoint of a model three of whose layers share a matrix, where the last of them has one of its own."""
    layers = jobs.layers(job.model, deepspeed_job.tied_spec)
    layers[10] = jobs.Shared("square")
    engine = deepspeed_job.build(job, layers=layers)
    engine.load_checkpoint(folder, "common")
    return [tied.pending() for tied in engine._ties.gradients.values()]


def test_sums_of_ties_between_other_stages_are_dropped_with_a_word(tmp_path):
    job = dataclasses.replace(JOBS["thrice"], script=("train x3", "save"))
    deepspeed_job.run(job, folder=str(tmp_path))
    for rank, outcome in enumerate(ranks.gather_outcomes(load_untied, 3, (job, str(tmp_path)))):
        assert outcome.value == ([[]] if rank < 2 else []), outcome
        assert "dropped, no such tie here: square.weight of stages [0, 1, 2] of 3" in outcome.output


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


def follow_in_slices(job):
    """The job on every one of two slices of a stage, which share all weights."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    engine = deepspeed_job.build(job, topology=PipeModelDataParallelTopology(num_pp=job.stages, num_mp=2, num_dp=1))
    return deepspeed_job.follow(engine, job)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_slices_tie_as_the_reference(precision):
    """A norm counts what all slices hold once."""
    job = tied(stages=2, accumulation=1, script=("train x4", "drain", "train x3"), clip=2.0, precision=precision)
    results, expected = ranks.run_ranks(follow_in_slices, 4, (job,)), reference.run(job)
    for part in range(2):
        deepspeed_job.assert_equal(results[part::2], expected)


@pytest.mark.parametrize(("clip", "refused"), [(0.5, True), (0.0, False)])
def test_clipping_by_stage_would_part_the_copies_and_is_refused(clip, refused):
    job = tied(stages=2, accumulation=2, clip=clip, script=("train", "drain"), config={"paci": {"clip": "stage"}})
    for outcome in ranks.gather_outcomes(deepspeed_job.train, 2, (job,), timeout=60):
        assert (outcome.raised[:1] == ("UnsupportedError",)) == refused, outcome
        if refused:
            for words in ('"clip": "stage"', '"gradient_clipping": 0.5', "square, words", 'use "clip": "global"'):
                assert words in outcome.error


@pytest.mark.parametrize(
    ("model", "schedule", "error", "says"),
    [("still", "stock", "AttributeError", "_hp_grad"), ("deaf", "paci", "UnsupportedError", "square.weight of stages")],
    ids=["stock, frozen", "a copy without a gradient"],
)
def test_ties_that_bf16_cannot_train_fail_at_once(model, schedule, error, says):
    """BF16_Optimizer sums no gradients of a weight that gets none; stock 0.19.8 reads the sum of a frozen one, too."""
    job = Job(stages=3, accumulation=2, script=("train x9",), model=model, precision="bf16")
    outcomes = ranks.gather_outcomes(deepspeed_job.train, 3, (job, schedule), timeout=60)
    [failed] = [outcome for outcome in outcomes if outcome.raised[:1] == (error,)][:1]
    assert says in failed.error
    assert all(outcome.ended == "raised" for outcome in outcomes)


def test_gradients_that_overflow_are_dropped_element_by_element():
    for dtype, huge in [(torch.float32, 1e20), (torch.bfloat16, 1e20), (torch.float16, 6e4)]:
        gradient = torch.tensor([1.5, torch.inf, -torch.inf, torch.nan, huge, -huge, -2.0, 0.0], dtype=dtype)
        sparse = gradient.to_sparse()
        drop_overflow([gradient, sparse])
        assert gradient.tolist() == sparse.to_dense().tolist() == [1.5, 0, 0, 0, 0, 0, -2.0, 0]


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


@pytest.mark.parametrize(
    "job",
    [tied(stages=3, accumulation=1, script=(), clip=0.3), tied(stages=3, accumulation=2, script=(), precision="bf16")],
    ids=["fp32, clipping", "bf16"],
)
def test_only_the_tied_sums_span_stages_and_nobody_waits_for_them_early(job):
    """One all-reduce for each tied weight and update, waited for j updates after it; all copies post it in one call."""
    pipeline = reference.Reference(job).pipeline
    results = ranks.run_ranks(watch_steady_calls, 3, (job, 4, 4))
    for stage, result in enumerate(results):
        here = [key for key in jobs.TIED if stage in job.holders(key)]
        assert len(result["collectives"]) == len(here) * result["updates"] > (0 if here else -1)
        for name, members, callers in result["collectives"]:
            assert name == "allreduce"
            assert members == [0, 2]
            assert "post_sum" in callers
        assert len(result["waits"]) == len(here) * result["updates"]
        assert {waited - number for number, waited in result["waits"]} == {pipeline.tied_delay(key) for key in here}
    assert sorted(results[0]["posted"]) == sorted(results[2]["posted"])


def test_a_gradient_of_a_tied_weight_is_the_sum_over_the_copies():
    """The reference against autograd: one process, one weight, no pipeline, plain SGD, at the first sum's update."""
    job = tied(stages=2, accumulation=2, optimizer="sgd", script=("train", "drain", "train", "drain"))
    truth = reference.Reference(job)
    truth.run()
    layers = jobs.layers("tied")
    layers[jobs.TIED["words"][1]] = layers[jobs.TIED["words"][0]]
    layers[jobs.TIED["square"][1]] = layers[jobs.TIED["square"][0]]
    divisor = {"loss": 2, "nowhere": 1}.get(versions.where_gradients_are_divided())
    if divisor is None:
        pytest.skip("this DeepSpeed gives the copies gradients of different scales, under 1F1B too")
    for index in range(2):
        batch, labels = jobs.micro_batch("tied", index)
        (jobs.loss(torch.nn.Sequential(*layers)(batch), labels) / divisor).backward()
    for key, (first, _) in jobs.TIED.items():
        total = sum(gradient for [gradient] in truth.pipeline.handed[key][0].values())
        torch.testing.assert_close(total, layers[first].weight.grad, rtol=1e-5, atol=1e-6)

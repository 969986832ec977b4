"""Tied weights: the sum of the copies' gradients arrives a fixed number of updates late, and the copies stay one."""

import pytest
import torch

from paci_schedule.runtime.deferred.tied import drop_overflow
from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference import deepspeed as reference
from testing.reference import versions

MIXED = ("train x3", "drain", "train x2", "eval", "train", "drain", "drain", "train x2", "save", "train x2")
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
FAST = {  # every way to sum, update, clip and resume once
    "P=2 a=3",
    "P=3 a=1",
    "P=4 a=2, clipping",
    "bf16, clipping",
    "bf16 sums, ZeRO-1",
    "a flush on the way",
    "accumulation changes, clipping",
    "thrice, clipping",
    "a stage of copies, clipping",
    "frozen, bf16 sums",
    "a copy without a gradient, ZeRO-1",
    "slack",
    "overflow, fp32, clipping",
    "overflow, bf16, clipping",
    "overflow of a tied weight, bf16, clipping",
}
SLOW = JOBS.keys() - FAST
CASES = deepspeed_job.cases(JOBS, SLOW)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return deepspeed_job.Runs(JOBS, tmp_path_factory.mktemp("tied"), SLOW)


@pytest.mark.parametrize("name", CASES)
def test_the_engine_ties_as_the_reference(name, runs):
    # Three numbers have several sums: the process group chooses one, the same for all of its ranks.
    rounding = 1e-5 if JOBS[name].model == "thrice" else 0.0
    truth = deepspeed_job.assert_as_reference(JOBS[name], runs[name], rounding=rounding)
    if JOBS[name].clip:
        assert min(truth.factors()) < 1


@pytest.mark.parametrize("name", CASES)
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


SLICED = {
    precision: tied(stages=2, accumulation=1, script=("train x4", "drain", "train x3"), clip=2.0, precision=precision)
    for precision in ("fp32", "bf16")
}


def follow_in_slices():
    """The jobs on every one of two slices of a stage, which share all weights."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return {
        precision: deepspeed_job.follow(
            deepspeed_job.build(job, topology=PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)), job
        )
        for precision, job in SLICED.items()
    }


def test_slices_tie_as_the_reference():
    """A norm counts what all slices hold once."""
    results = ranks.run_ranks(follow_in_slices, 4)
    for precision, job in SLICED.items():
        expected = reference.run(job)
        for part in range(2):
            deepspeed_job.assert_equal([result[precision] for result in results[part::2]], expected)


def test_gradients_that_overflow_are_dropped_element_by_element():
    for dtype, huge in [(torch.float32, 1e20), (torch.bfloat16, 1e20), (torch.float16, 6e4)]:
        gradient = torch.tensor([1.5, torch.inf, -torch.inf, torch.nan, huge, -huge, -2.0, 0.0], dtype=dtype)
        sparse = gradient.to_sparse()
        drop_overflow([gradient, sparse])
        assert gradient.tolist() == sparse.to_dense().tolist() == [1.5, 0, 0, 0, 0, 0, -2.0, 0]


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

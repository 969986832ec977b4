"""The engine does what the reference does: weights after every call with difference 0, losses, versions and drift."""

import dataclasses

import pytest

from testing import deepspeed_job
from testing.jobs import Job
from testing.reference.deepspeed import Reference
from testing.reference.versions import where_gradients_are_divided

STEADY = ("train x6",)
MIXED = ("train x3", "drain", "train x2", "eval", "eval", "train", "drain", "drain", "train x4", "save", "train x3")
ADAMW = {
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 0.02, "betas": [0.8, 0.95], "weight_decay": 0.03, "torch_adam": True},
    }
}

BY_STAGE = {"paci": {"clip": "stage"}}

JOBS = {
    "one stage": Job(stages=1, accumulation=3, script=MIXED, clip=0.6, warmup=True),
    "one stage, bf16": Job(stages=1, accumulation=2, script=MIXED, precision="bf16"),
    "P=2 a=1": Job(stages=2, accumulation=1, script=STEADY),
    "P=2 a=3": Job(stages=2, accumulation=3, script=MIXED, warmup=True),
    "P=3 a=2": Job(stages=3, accumulation=2, script=MIXED, optimizer="sgd"),
    "P=3 a=5, one call": Job(stages=3, accumulation=5, script=("train", "drain")),
    "P=4 a=1": Job(stages=4, accumulation=1, script=MIXED),
    "P=4 a=3": Job(stages=4, accumulation=3, script=MIXED, optimizer="groups", warmup=True),
    "P=4 a=8": Job(stages=4, accumulation=8, script=("train x3", "drain")),
    "clipping is by stage": Job(stages=3, accumulation=2, script=STEADY, clip=0.4, config=BY_STAGE),
    "optimizer of the config": Job(stages=2, accumulation=2, script=STEADY, config=ADAMW),
    "bf16": Job(stages=2, accumulation=3, script=MIXED, precision="bf16", warmup=True),
    "bf16, clipping, two optimizer groups": Job(
        stages=4, accumulation=2, script=STEADY, precision="bf16", clip=0.4, optimizer="groups", config=BY_STAGE
    ),
    "bf16 on an fp32 wire": Job(
        stages=3, accumulation=3, script=STEADY, precision="bf16", config={"communication_data_type": "fp32"}
    ),
    "bf16 sums, clipping": Job(
        stages=3, accumulation=4, script=STEADY, precision="bf16-bf16", clip=0.4, config=BY_STAGE
    ),
    "tuples": Job(stages=3, accumulation=2, script=MIXED, model="pairs"),
    "tuples, bf16": Job(
        stages=2, accumulation=3, script=STEADY, model="pairs", precision="bf16", clip=0.9, config=BY_STAGE
    ),
    "tuples, one stage": Job(stages=1, accumulation=3, script=STEADY, model="pairs"),
    "a stage without parameters": Job(stages=3, accumulation=2, script=MIXED, model="hollow", config=ADAMW),
    "a stage without parameters, bf16": Job(
        stages=3, accumulation=2, script=MIXED, model="hollow", config=ADAMW | BY_STAGE, precision="bf16", clip=0.1
    ),
    "a frozen stage": Job(stages=3, accumulation=2, script=MIXED, model="frozen", warmup=True),
    "a frozen stage, bf16, clipping": Job(
        stages=3, accumulation=3, script=MIXED, model="frozen", precision="bf16-bf16", clip=0.4, config=BY_STAGE
    ),
    "adapters, and a last stage without": Job(stages=3, accumulation=2, script=MIXED, model="lora", optimizer="sgd"),
    "adapters, bf16, clipping": Job(
        stages=2, accumulation=3, script=STEADY, model="lora", precision="bf16", clip=0.4, config=BY_STAGE
    ),
    "accumulation changes on the way": Job(
        stages=3, accumulation=2, script=("train x3", "accumulate=5", "train x2", "accumulate=1", "train x4", "drain")
    ),
}


def assert_pulled(job, results):
    """Every train_batch pulls exactly a micro-batches, on the stages that read data; nothing else pulls any."""
    expected, total, accumulation = [], 0, job.accumulation
    for action in job.actions():
        if action.startswith("accumulate="):
            accumulation = int(action.partition("=")[2])
        total += accumulation if action == "train" else 0
        expected.append(total)
    for stage, result in enumerate(results):
        assert result["pulled"] == (expected if stage in (0, job.stages - 1) else [0] * len(expected))


def assert_as_reference(job, results):
    deepspeed_job.assert_as_reference(job, results)
    assert_pulled(job, results)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return deepspeed_job.Runs(JOBS, tmp_path_factory.mktemp("equivalence"))


@pytest.mark.parametrize("name", JOBS)
def test_the_engine_trains_as_the_reference(name, runs):
    assert_as_reference(JOBS[name], runs[name])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-bf16"])
@pytest.mark.parametrize("model", ["words", "pairs"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_the_engine_trains_as_the_reference_in_every_combination(stages, model, precision, tmp_path):
    jobs = {
        str(accumulation): Job(
            stages=stages,
            accumulation=accumulation,
            script=MIXED,
            model=model,
            precision=precision,
            clip=0.3 if accumulation % 2 else 0.0,
            warmup=True,
            optimizer="groups",
            config=BY_STAGE,
        )
        for accumulation in range(1, 9)
    }
    runs = deepspeed_job.Runs(jobs, tmp_path)
    for name, job in jobs.items():
        assert_as_reference(job, runs[name])


@pytest.mark.parametrize("name", ["P=3 a=2", "bf16"])
def test_two_runs_of_a_job_are_equal_to_the_bit(name):
    """Nothing depends on when messages arrive: not one bit differs between runs."""
    job = dataclasses.replace(JOBS[name], script=STEADY)
    first, second = (deepspeed_job.run(job) for _ in range(2))  # in processes of their own
    for one, other in zip(first, second, strict=True):
        for before, after in zip(one["moments"], other["moments"], strict=True):
            assert before["weights"].keys() == after["weights"].keys()
            assert all((before["weights"][key] == after["weights"][key]).all() for key in before["weights"])


@pytest.mark.skipif(where_gradients_are_divided() != "loss", reason="the limits are chosen for the newest DeepSpeed")
@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if job.clip])
def test_jobs_that_clip_do_so_at_some_updates_and_not_at_others(name):
    reference = Reference(JOBS[name])
    reference.run()
    factors = reference.factors()
    assert min(factors) < 1 < max(factors)


def names(engine):
    """What kind of engine it is, in the framework's own classes."""
    import deepspeed
    from deepspeed.runtime.pipe.engine import PipelineEngine

    return {
        "class": f"{type(engine).__module__}.{type(engine).__qualname__}",
        "isinstance": isinstance(engine, deepspeed.PipelineEngine) and isinstance(engine, PipelineEngine),
        "bound": engine.pipeline_stats()["drift_bound"] if hasattr(engine, "pipeline_stats") else None,
    }


def test_a_paci_engine_is_a_pipeline_engine():
    results = deepspeed_job.run(Job(stages=4, accumulation=2, script=()), inspect=names)
    for stage, result in enumerate(results):
        assert result["inspected"]["isinstance"]
        assert result["inspected"]["class"].startswith("paci_schedule.")
        assert result["inspected"]["bound"] == [2, 1, 1, 0][stage]


@pytest.mark.parametrize("schedule", ["1f1b", None, "stock"], ids=["1f1b", "registered, no key", "not registered"])
def test_without_the_paci_schedule_the_engine_is_the_stock_class(schedule):
    """The class itself, not one that behaves like it."""
    results = deepspeed_job.run(Job(stages=2, accumulation=2, script=("train x2",)), schedule, inspect=names)
    for result in results:
        assert result["inspected"] == {
            "class": "deepspeed.runtime.pipe.engine.PipelineEngine",
            "isinstance": True,
            "bound": None,
        }

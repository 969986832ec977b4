"""GPipe and ZB-H1 in DeepSpeed: the updates of DeepSpeed's own 1F1B, under another order of the same micro-batches."""

import dataclasses

import pytest

from integration_tests.test_deepspeed_equivalence import ADAMW
from paci_schedule import PipelineSpec
from paci_schedule.core.schedules.registry import schedule as schedule_called
from paci_schedule.errors import ConfigError, UnsupportedError
from testing import deepspeed_job, ranks
from testing.jobs import Job
from testing.reference.deepspeed import Reference

TRAINED = ("train x3",)
JOBS = {
    "P=2 a=3, tuples, clipped": Job(stages=2, accumulation=3, script=TRAINED, model="pairs", clip=0.7, warmup=True),
    "P=3 a=5": Job(stages=3, accumulation=5, script=TRAINED, optimizer="sgd"),
    "P=3 a=4, bf16, clipped": Job(stages=3, accumulation=4, script=TRAINED, precision="bf16", clip=0.5),
    "P=3 a=2, a stage without parameters": Job(stages=3, accumulation=2, script=TRAINED, model="hollow", config=ADAMW),
    "P=3 a=3, a frozen stage": Job(stages=3, accumulation=3, script=TRAINED, model="frozen", optimizer="sgd"),
    "P=3 a=2, tied": Job(stages=3, accumulation=2, script=TRAINED, model="tied"),
    "P=3 a=3, tuples of changing shapes": Job(
        stages=3, accumulation=3, script=TRAINED, model="pairs", shapes=((3, 5), (2, 3), (3, 1), (1, 5), (2, 2))
    ),
}
CHANGES = ("train", "schedule=zb-h1", "train x2", "schedule=paci", "train", "schedule=gpipe", "train")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    calls = {"changes": (Job(stages=3, accumulation=4, script=CHANGES, clip=0.6), "paci")}
    for name, job in JOBS.items():
        for schedule in ("gpipe", "zb-h1"):
            chosen = dataclasses.replace(job, script=(f"schedule={schedule}", *job.script))
            calls[f"{name}, {schedule}"] = chosen, schedule
    return deepspeed_job.Runs(calls, tmp_path_factory.mktemp("flushed"))


def assert_as_1f1b(name, results, rounding=0.0):
    """As the reference of a flush after every batch, which sums micro-batches in the order of 1F1B."""
    flush = "schedule=1f1b"
    job = dataclasses.replace(JOBS[name], script=(flush, *JOBS[name].script))
    renamed = [
        {
            **result,
            "moments": [
                {**moment, "action": moment["action"].replace(result["moments"][0]["action"], flush)}
                for moment in result["moments"]
            ],
        }
        for result in results
    ]
    expected = Reference(job).run()
    deepspeed_job.assert_equal(renamed, expected, counters=False, rounding=rounding)
    if job.clip:
        for stage, result in enumerate(results):
            norms = [moment.norm[stage] for moment in expected]
            found = [moment["norm"] for moment in result["moments"]]
            assert found == pytest.approx(norms, rel=max(2e-7, rounding), nan_ok=True)


@pytest.mark.parametrize("name", JOBS)
def test_zb_h1_computes_what_1f1b_does(name, runs):
    """It sums the gradients of the micro-batches in the same order: difference 0."""
    assert_as_1f1b(name, runs[f"{name}, zb-h1"])


@pytest.mark.parametrize("name", JOBS)
def test_gpipe_computes_what_1f1b_does_but_for_rounding(name, runs):
    """It sums the gradients of the micro-batches in the opposite order."""
    assert_as_1f1b(name, runs[f"{name}, gpipe"], rounding=1e-4)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1"])
def test_every_batch_ends_with_an_empty_pipe_and_no_drift(name, schedule, runs):
    job = JOBS[name]
    spec = PipelineSpec(stages=job.stages, accumulation=job.accumulation)
    for stage, result in enumerate(runs[f"{name}, {schedule}"]):
        for moment in result["moments"]:
            stats = moment["stats"]
            assert (stats["in_flight"], stats["max_drift"], stats["drift_bound"]) == (0, 0, 0)
            assert stats["forwards"] == stats["backwards"] == stats["version"] * job.accumulation
        assert stats["peak_in_flight"] == schedule_called(schedule).in_flight(spec, stage)


def test_a_running_job_changes_to_zb_h1_and_gpipe_and_back_to_paci(runs):
    for stage, result in enumerate(runs["changes"]):
        in_flight = [moment["stats"]["in_flight"] for moment in result["moments"]]
        assert in_flight == [2 - stage, 0, 0, 0, 0, 2 - stage, 0, 0]
    forward = [moment["stats"]["forwards"] for moment in runs["changes"][0]["moments"]]
    assert forward == [4, 4, 8, 12, 12, 16, 16, 20]


def refusals():
    """What the engine says to a job that cannot split its backward, on this rank."""
    job, said = Job(stages=2, accumulation=2, script=()), []
    zero = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    for changed, options in ((job, {"activation_checkpoint_interval": 1}), (dataclasses.replace(job, config=zero), {})):
        with pytest.raises(UnsupportedError) as caught:
            deepspeed_job.build(changed, "zb-h1", **options)
        said.append(str(caught.value))
    return said


def change_with_slack():
    """What a running job with slack says to a schedule that takes none."""
    engine = deepspeed_job.build(Job(stages=2, accumulation=2, script=(), config={"paci": {"extra_in_flight": 1}}))
    with pytest.raises(ConfigError) as caught:
        engine.set_pipeline_schedule("zb-h1")
    engine.set_pipeline_schedule("1f1b")
    return str(caught.value)


def test_a_running_job_with_slack_is_refused_a_schedule_that_takes_none():
    for said in ranks.run_ranks(change_with_slack, 2, (), timeout=120.0):
        assert said.startswith("extra_in_flight=1: zb-h1 has a fixed number of micro-batches in flight")


def test_what_cannot_split_its_backward_is_refused_by_name_on_every_rank():
    for checkpointed, sharded in ranks.run_ranks(refusals, 2, (), timeout=120.0):
        assert '"pipeline_schedule": "zb-h1" cannot run this job' in checkpointed
        assert "activation_checkpoint_interval=1" in checkpointed
        assert '"zero_optimization": {"stage": 0}' in sharded

"""Schedules that change in a running job: to 1F1B and back, and a warm-up under 1F1B."""

import dataclasses

import pytest

from integration_tests.test_deepspeed_clip import norms_of
from testing import deepspeed_job
from testing.jobs import Job
from testing.reference.deepspeed import run as reference_of

THERE_AND_BACK = ("train x3", "schedule=1f1b", "train x2", "eval", "train", "schedule=paci", "train x3", "drain")
TWICE = (
    "schedule=1f1b",
    "train",
    "schedule=paci",
    "train",
    "schedule=paci",
    "train x2",
    "schedule=1f1b",
    "train x2",
    "schedule=1f1b",
    "train",
    "schedule=paci",
    "train x2",
    "save",
    "train",
)
WARM = ("train x2", "eval", "train x4", "save", "train x2")


def warmup(updates):
    return {"paci": {"flush_warmup_steps": updates}}


JOBS = {
    "P=2 a=1": Job(stages=2, accumulation=1, script=TWICE, clip=0.9),
    "P=2 a=3": Job(stages=2, accumulation=3, script=THERE_AND_BACK, clip=0.6, warmup=True),
    "P=2 a=2, warm-up": Job(stages=2, accumulation=2, script=WARM, clip=0.6, config=warmup(3)),
    "P=2, warm-up of none": Job(stages=2, accumulation=2, script=WARM, config=warmup(0)),
    "P=3 a=2": Job(stages=3, accumulation=2, script=TWICE, optimizer="sgd"),
    "P=3 a=1, warm-up": Job(stages=3, accumulation=1, script=WARM, config=warmup(4), warmup=True),
    "P=3, longer than the run": Job(stages=3, accumulation=2, script=WARM, config=warmup(99)),
    "P=3, bf16, warm-up": Job(stages=3, accumulation=2, script=WARM, config=warmup(3), precision="bf16"),
    "P=4 a=3": Job(stages=4, accumulation=3, script=THERE_AND_BACK, optimizer="groups"),
    "P=4 a=1, warm-up": Job(stages=4, accumulation=1, script=WARM, config=warmup(1)),
    "P=2, tied, warm-up": Job(stages=2, accumulation=1, script=WARM, config=warmup(2), model="tied", clip=3.0),
    "P=3, tied": Job(stages=3, accumulation=1, script=TWICE, model="tied"),
    "P=2, the user's choice ends a warm-up no earlier": Job(
        stages=2,
        accumulation=2,
        script=("train", "schedule=paci", "train x3", "schedule=1f1b", "train"),
        config=warmup(2),
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return deepspeed_job.Runs(JOBS, tmp_path_factory.mktemp("switch"))


@pytest.mark.parametrize("name", JOBS)
def test_the_engine_switches_as_the_reference(name, runs):
    """Weights, optimizer states (by what comes of them), rates, counters, drift: as if there were one long run."""
    deepspeed_job.assert_as_reference(JOBS[name], runs[name])


@pytest.mark.parametrize("name", JOBS)
def test_under_1f1b_every_batch_ends_with_an_empty_pipe_and_no_drift(name, runs):
    """At every stage; and PACI's batches end with micro-batches in flight everywhere but at the last one."""
    job = JOBS[name]
    for stage, result in enumerate(runs[name]):
        schedule, drifted = "paci", 0
        for moment, steps in zip(result["moments"], _batches(result["moments"]), strict=True):
            if moment["action"].startswith("schedule="):
                schedule = moment["action"].partition("=")[2]
                assert moment["stats"]["in_flight"] == 0
            if moment["action"] == "train":
                flush = schedule == "1f1b" or steps <= job.config.get("paci", {}).get("flush_warmup_steps", 0)
                in_flight = 0 if flush else job.stages - 1 - stage
                assert (moment["stats"]["in_flight"] > 0) == (in_flight > 0)
                if flush:
                    assert moment["stats"]["version"] == steps
                    assert sum(moment["stats"]["drift_histogram"].values()) == steps * job.accumulation
                    late = sum(count for drift, count in moment["stats"]["drift_histogram"].items() if drift)
                    assert late == drifted
            drifted = sum(count for drift, count in moment["stats"]["drift_histogram"].items() if drift)


def _batches(moments):
    """After every moment, the batches so far."""
    done = 0
    for moment in moments:
        done += moment["action"] == "train"
        yield done


def test_a_clipped_warm_up_of_several_stages_is_stock_and_then_paci(tmp_path):
    """A sum over three or more stages has an order of its own: here the stock engine is the reference of the flush."""
    job = Job(stages=3, accumulation=2, script=("train x3",), clip=0.7, precision="bf16")
    warm = dataclasses.replace(job, script=("train x3", "train x3", "drain"), config=warmup(3))
    loads = dataclasses.replace(job, script=("train x3", "drain"), first_micro_batch=6)
    stock = dataclasses.replace(job, script=("train x3", "save"))
    folder = {"folder": str(tmp_path)}
    mine, theirs = deepspeed_job.run_all((warm, "paci", folder), (stock, "stock", folder))
    for result, other in zip(mine, theirs, strict=True):
        assert norms_of(result)[:3] == norms_of(other)[:3]
        for moment, truth in zip(result["moments"][:3], other["moments"][:3], strict=True):
            assert all((moment["weights"][name] == value).all() for name, value in truth["weights"].items())
    resumed = deepspeed_job.run(loads, folder=str(tmp_path), load=True)
    for result, other in zip(resumed, mine, strict=True):  # the same, but that no norm was carried into it
        assert norms_of(result)[-1] == pytest.approx(norms_of(other)[-1], rel=0.5)
        assert result["steps"] == other["steps"] == 6


def test_a_warm_up_goes_on_after_a_resume(tmp_path):
    """Updates are counted from the start of training, not of the process."""
    job = Job(stages=2, accumulation=2, clip=0.6, config=warmup(3), script=("train x2", "save", "train x3", "drain"))
    rest = dataclasses.replace(job, script=job.script[2:], first_micro_batch=4)
    whole, resumed = deepspeed_job.run_resumed(job, rest, tmp_path)
    deepspeed_job.assert_as_reference(job, whole)
    for result, other in zip(resumed, whole, strict=True):
        assert norms_of(result) == norms_of(other)[3:]
        for moment, truth in zip(result["moments"], other["moments"][3:], strict=True):
            assert moment["stats"]["in_flight"] == truth["stats"]["in_flight"]
            assert all((moment["weights"][key] == value).all() for key, value in truth["weights"].items())


def test_switching_schedules_changes_the_training():
    """What is compared above differs from a run that never switched."""
    job = JOBS["P=3 a=2"]
    switched = reference_of(job)[-1]
    never = reference_of(dataclasses.replace(job, script=tuple(a for a in job.script if "=" not in a)))[-1]
    for stage in range(job.stages):
        assert any((switched.weights[stage][name] != value).any() for name, value in never.weights[stage].items())

"""`SchedulePaci` does what the reference does: weights with difference 0 after every call, losses, versions, drift."""

import math

import pytest

from testing import deepspeed_job, torch_job
from testing.jobs import Job
from testing.reference.deepspeed import Reference

STEADY = ("train x6",)
MIXED = ("train x3", "drain", "train x2", "eval", "eval", "train", "drain", "drain", "train x4")
SWITCHED = ("train x2", "schedule=1f1b", "train x2", "schedule=paci", "train x3", "drain")

JOBS = {
    f"P={stages} a={accumulation}": Job(
        stages=stages, accumulation=accumulation, script=STEADY if accumulation % 2 else MIXED, warmup=True
    )
    for stages in (2, 3, 4)
    for accumulation in range(1, 9)
} | {
    "one stage": Job(stages=1, accumulation=3, script=MIXED, clip=0.6, warmup=True),
    "groups, clipping": Job(stages=3, accumulation=2, script=MIXED, optimizer="groups", clip=0.4),
    "clipping by stage": Job(stages=3, accumulation=2, script=STEADY, clip=0.4, config={"paci": {"clip": "stage"}}),
    "tuples": Job(stages=3, accumulation=2, script=("train x3", "drain", "train x4"), model="pairs"),
    "a frozen stage": Job(stages=3, accumulation=2, script=MIXED, model="frozen", warmup=True),
    "tied": Job(stages=4, accumulation=2, script=MIXED, model="tied"),
    "tied, clipping, switched": Job(stages=3, accumulation=2, script=SWITCHED, model="tied", clip=0.4),
    "three copies": Job(stages=4, accumulation=3, script=STEADY, model="thrice", optimizer="sgd", clip=0.6),
    "slack, predictions, a warm-up under 1f1b": Job(
        stages=3,
        accumulation=4,
        script=MIXED,
        clip=0.4,
        config={"paci": {"prediction": "every", "extra_in_flight": 1, "flush_warmup_steps": 1}},
    ),
    "predictions once a window, tied": Job(
        stages=4, accumulation=4, script=MIXED, model="tied", clip=0.4, config={"paci": {"prediction": "window"}}
    ),
    "a prediction at every second stale forward": Job(
        stages=4, accumulation=4, script=STEADY, config={"paci": {"prediction": 2}}
    ),
    "a reach": Job(
        stages=3, accumulation=4, script=STEADY, config={"paci": {"prediction": "every", "prediction_reach": 1.5}}
    ),
}


@pytest.fixture(scope="module")
def runs():
    results = {}

    def of(name):
        if name not in results:
            together = [other for other in JOBS if JOBS[other].stages == JOBS[name].stages]
            found = torch_job.run_all(*((JOBS[other], {}) for other in together))
            results.update(zip(together, found, strict=True))
        return results[name]

    return of


@pytest.mark.parametrize("name", JOBS)
def test_the_schedule_trains_as_the_reference(name, runs):
    job, results = JOBS[name], runs(name)
    expected = Reference(job).run()
    for stage, result in enumerate(results):
        for moment, truth in zip(result["moments"], expected, strict=True):
            told = moment["action"] == "train" or (moment["action"] == "eval" and stage == job.stages - 1)
            if not told or math.isnan(moment["loss"]):  # a stage may have finished nothing yet
                assert not told or moment["stats"]["backwards"] == 0
                truth.loss[stage] = moment["loss"] = math.nan
    # gloo adds three copies up in another order than the reference.
    deepspeed_job.assert_equal(results, expected, rounding=1e-5 if job.model == "thrice" else 0.0)
    if job.clip:
        for stage, result in enumerate(results):
            found = [moment["norm"] for moment in result["moments"]]
            assert found == pytest.approx([truth.norm[stage] for truth in expected], rel=2e-7, nan_ok=True)

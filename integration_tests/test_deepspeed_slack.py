"""Slack for slow links: weights, drift and live micro-batches as the specification of the pipeline states them."""

import math

import pytest

from paci_schedule import PipelineSpec
from paci_schedule.core.drift import drift_of
from testing import deepspeed_job
from testing.jobs import Job

MIXED = ("train x5", "drain", "train x4", "eval", "train x3")


def slack(extra):
    return {"paci": {"extra_in_flight": extra}}


JOBS = {
    "P=2 a=1 k=1": Job(stages=2, accumulation=1, script=MIXED, config=slack(1)),
    "P=2 a=3 k=[4]": Job(stages=2, accumulation=3, script=MIXED, config=slack([4])),
    "P=3 a=2 k=1": Job(stages=3, accumulation=2, script=MIXED, config=slack(1)),
    "P=3 a=2 k=[0, 3]": Job(stages=3, accumulation=2, script=MIXED, config=slack([0, 3]), warmup=True),
    "P=3 a=1 k=[2, 0]": Job(stages=3, accumulation=1, script=MIXED, config=slack([2, 0]), optimizer="sgd"),
    "P=3 a=4 k=0": Job(stages=3, accumulation=4, script=("train x3", "drain"), config=slack(0)),
    "P=3 k=[1, 1], bf16, clipping": Job(
        stages=3, accumulation=2, script=MIXED, config=slack([1, 1]), clip=0.6, precision="bf16"
    ),
    "P=4 a=1 k=2": Job(stages=4, accumulation=1, script=("train x9", "drain", "train x2"), config=slack(2)),
    "P=4 a=3 k=[0, 1, 0]": Job(stages=4, accumulation=3, script=MIXED, config=slack([0, 1, 0])),
    "P=4 a=2 k=[1, 0, 2], tuples": Job(
        stages=4, accumulation=2, script=("train x6", "drain"), config=slack([1, 0, 2]), model="pairs"
    ),
    "P=3 k=[0, 2], early receives": Job(
        stages=3, accumulation=2, script=MIXED, config={"paci": {"extra_in_flight": [0, 2], "early_receives": True}}
    ),
    "P=2 k=[2], switching": Job(
        stages=2,
        accumulation=2,
        config=slack([2]),
        clip=0.6,
        script=("train x3", "schedule=1f1b", "train x2", "schedule=paci", "train x4", "drain"),
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return deepspeed_job.Runs(JOBS, tmp_path_factory.mktemp("slack"))


def look_aheads(job):
    """d of every stage, from the words of the specification."""
    extra, last = job.config["paci"]["extra_in_flight"], job.stages - 1
    if isinstance(extra, int):
        return [last - stage + math.ceil(extra * (last - stage) / last) for stage in range(job.stages)]
    return [last - stage + sum(extra[stage:]) for stage in range(job.stages)]


@pytest.mark.parametrize("name", JOBS)
def test_the_engine_with_slack_trains_as_the_reference(name, runs):
    deepspeed_job.assert_as_reference(JOBS[name], runs[name])


@pytest.mark.parametrize("name", JOBS)
def test_slack_sets_live_micro_batches_and_drift(name, runs):
    """d_s + 1 micro-batches live at most, drift bound ceil(d_s / a), reached, and every drift the closed form's."""
    job = JOBS[name]
    extra = job.config["paci"]["extra_in_flight"]
    spec = PipelineSpec(
        stages=job.stages,
        accumulation=job.accumulation,
        extra_in_flight=tuple(extra) if isinstance(extra, list) else extra,
    )
    for stage, (result, ahead) in enumerate(zip(runs[name], look_aheads(job), strict=True)):
        stats = result["moments"][-1]["stats"]
        bound = math.ceil(ahead / job.accumulation)
        assert stats["peak_in_flight"] == ahead + 1
        assert result["drift_bound"] == stats["max_drift"] == bound
        if "drain" in job.script and "schedule=1f1b" not in job.script:
            first = job.script.index("drain")
            batches = int(job.script[first - 1].partition(" x")[2])
            at = [moment["action"] for moment in result["moments"]].index("drain")
            expected = [drift_of(spec, stage, number) for number in range(batches * job.accumulation)]
            counted = result["moments"][at]["stats"]["drift_histogram"]
            assert counted == {drift: expected.count(drift) for drift in sorted(set(expected))}

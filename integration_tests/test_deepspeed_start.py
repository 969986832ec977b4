"""A job that starts: it says that its schedule is on, and a schedule that is asked for never stays off unnoticed."""

from testing import deepspeed_job, ranks
from testing.jobs import Job

EVERY = {"prediction": "every", "prediction_reach": 1.5}
STARTS = [
    (
        Job(stages=2, accumulation=3, script=(), clip=0.5),
        '"paci" on P = 2 stages, a = 3 micro-batches an update; drift at most 1 update; the global norm is clipped to '
        "0.5, with norms of other stages that are up to 1 update old; no prediction",
    ),
    (
        Job(stages=2, accumulation=1, script=(), config={"paci": EVERY}),
        '"paci" on P = 2 stages, a = 1 micro-batch an update; drift at most 1 update; no gradient clipping; stale '
        "forwards run on predicted weights ('every' with a reach of 1.5), which costs stage 0 a copy of its weights, ",
    ),
    (
        Job(stages=2, accumulation=2, script=(), precision="bf16", config={"paci": EVERY}),
        "no gradient clipping; stale forwards run on predicted weights ('every' with a reach of 1.5)\n",
    ),
    (
        Job(stages=2, accumulation=2, script=(), config={"pipeline_schedule": "zb-h1"}),
        '"zb-h1" on P = 2 stages, a = 2 micro-batches an update; no drift, as every batch ends with a flush\n',
    ),
]


def start_all(jobs):
    for job in jobs:
        deepspeed_job.build(job)


def test_rank_0_says_in_one_line_what_runs():
    first, last = ranks.gather_outcomes(start_all, 2, ([job for job, _ in STARTS],))
    assert (first.ended, last.ended) == ("returned", "returned"), first.error or last.error
    told = [line for line in first.output.splitlines(keepends=True) if line.startswith("paci_schedule")]
    for line, (_, says) in zip(told, STARTS, strict=True):
        assert says in line
    assert "paci_schedule" not in last.output


def test_one_stage_says_that_it_needs_no_schedule():
    [only] = ranks.gather_outcomes(start_all, 1, ([Job(stages=1, accumulation=2, script=())],))
    assert only.ended == "returned", only.error
    assert '"paci" on P = 1 stage, a = 2 micro-batches an update; one stage has no bubble' in only.output

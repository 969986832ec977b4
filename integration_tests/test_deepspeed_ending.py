"""The end of a script that calls neither `drain` nor `destroy`: its last update is applied, or said to be lost."""

import atexit
import re
import sys
import time

import pytest
import torch
import torch.distributed as dist

from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference import deepspeed as reference

JOB = Job(stages=2, accumulation=2, script=("train x4", "drain"), config={"steps_per_print": 2, "paci": {"timeout": 3}})
ENDS = ("together", "an exception", "too late", "forgotten", "no process group")


def end(job):
    """For each way to end: the version and the micro-batches in flight afterwards, seconds to the end, and weights."""
    told = {}
    for how in ENDS:
        engine = deepspeed_job.build(job)
        feed = jobs.data(job.model)
        print(f"--- {how}")
        for number in range(1, 5):
            engine.train_batch(feed)
            print(f"call {number} is over")
        if not engine.is_first_stage():
            if how == "an exception":
                sys.last_value = ValueError()  # what Python leaves there before it ends a script
            if how == "too late":
                time.sleep(4)
            if how == "forgotten":
                engine.__del__()
        if how == "no process group":
            dist.destroy_process_group()
        started = time.monotonic()
        atexit._run_exitfuncs()
        sys.last_value = None
        stats = engine.pipeline_stats()
        told[how] = stats["version"], stats["in_flight"], time.monotonic() - started, deepspeed_job.weights(engine)
    return told


@pytest.fixture(scope="module")
def outcomes():
    outcomes = ranks.gather_outcomes(end, 2, (JOB,))
    assert [outcome.ended for outcome in outcomes] == ["returned"] * 2, outcomes
    return outcomes


def printed(outcome, how):
    """What a rank printed in one of the ways to end."""
    return outcome.output.partition(f"--- {how}\n")[2].partition("\n--- ")[0]


def test_a_script_that_just_ends_has_applied_its_last_update(outcomes):
    truth = reference.run(JOB)[-1]
    for stage, outcome in enumerate(outcomes):
        version, in_flight, _, weights = outcome.value["together"]
        assert (version, in_flight) == (4, 0)
        assert all(torch.equal(weights[name], value) for name, value in truth.weights[stage].items())
    assert "lost" not in printed(outcomes[0], "together")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("an exception", "rank 1: an exception was on its way"),
        ("too late", "not all ranks came to their end within 3 s of rank 0's"),
        ("forgotten", "rank 1: nothing referred to the engine any more"),
        ("no process group", "the script destroyed the process group first"),
    ],
)
def test_where_it_cannot_one_line_says_why_and_what_to_do(how, reason, outcomes):
    first, second = outcomes
    version, in_flight, seconds, _ = first.value[how]
    assert (version, in_flight) == (3, 1)
    assert seconds < 20, "nothing hangs"
    [line] = re.findall(r".*update is lost.*", printed(first, how))
    assert reason in line
    assert "engine.destroy()" in line
    assert "lost" not in printed(second, how)


def test_a_printed_line_comes_at_the_next_update_and_the_last_one_at_the_end(outcomes):
    """The first stage applies update n - 1 in call n: that of update 2 is due in call 4, the last one at the end."""
    lines = [line for line in printed(outcomes[0], "together").splitlines() if re.match("steps|call", line)]
    assert [re.match(r"steps: \d|call \d", line)[0] for line in lines] == [
        *("call 1", "call 2", "call 3", "steps: 2", "call 4", "steps: 4"),
    ]

"""The end of a script that calls neither `drain` nor `destroy`: its last update is applied, or said to be lost."""

import atexit
import gc
import re
import sys
import time
import weakref

import pytest
import torch
import torch.distributed as dist

from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference import deepspeed as reference

JOB = Job(stages=2, accumulation=2, script=("train x4", "drain"), config={"steps_per_print": 2, "paci": {"timeout": 3}})
ENDS = ("together", "local", "an exception", "an exit code", "too late", "interrupted", "no process group")


def calls(how):
    return 3 if how == "an exception" else 4


def end(job):
    """For each way to end: the version and the micro-batches in flight afterwards, seconds to the end, the weights, and
    whether the engine is gone."""
    told = {}
    for how in ENDS:
        engine = deepspeed_job.build(job)
        feed = jobs.data(job.model)
        print(f"--- {how}")
        for number in range(1, calls(how) + 1):
            engine.train_batch(feed)
            print(f"call {number} is over")
        meter, found = engine._runner.meter, weakref.ref(engine)
        values = {name: value.detach() for name, value in engine.module.named_parameters()}  # of which no hook holds it
        if not engine.is_first_stage():
            if how == "an exception":
                sys.last_value = ValueError()  # what Python leaves there before it ends a script
            if how == "an exit code":
                sys.last_value = SystemExit(3)  # what the launcher leaves there
            if how == "too late":
                time.sleep(4)
            if how == "interrupted":
                engine._runner.interrupted = True
                engine._ending.keep(engine)
        if how == "no process group":
            dist.destroy_process_group()
        if how in ("local", "interrupted"):  # as one that a function had built
            engine = None
            gc.collect()
        started = time.monotonic()
        atexit._run_exitfuncs()
        seconds = time.monotonic() - started
        sys.last_value = engine = None
        gc.collect()
        told[how] = meter.version, meter.in_flight, seconds, values, found() is None
    return told


@pytest.fixture(scope="module")
def outcomes():
    outcomes = ranks.gather_outcomes(end, 2, (JOB,))
    assert [outcome.ended for outcome in outcomes] == ["returned"] * 2, outcomes
    return outcomes


def printed(outcome, how):
    """What a rank printed in one of the ways to end."""
    return outcome.output.partition(f"--- {how}\n")[2].partition("\n--- ")[0]


@pytest.mark.parametrize("how", ["together", "local"])
def test_a_script_that_just_ends_has_applied_its_last_update(how, outcomes):
    truth = reference.run(JOB)[-1]
    for stage, outcome in enumerate(outcomes):
        version, in_flight, _, weights, _ = outcome.value[how]
        assert (version, in_flight) == (4, 0)
        assert all(torch.equal(weights[name], value) for name, value in truth.weights[stage].items())
    assert "lost" not in printed(outcomes[0], how)


@pytest.mark.parametrize("how", ["together", "local"])
def test_an_engine_that_has_finished_is_held_no_longer(how, outcomes):
    """On the first stage; on the last, hooks of DeepSpeed's on its newest loss hold every engine, stock ones too."""
    assert outcomes[0].value[how][-1]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("an exception", "rank 1: an exception was on its way"),
        ("an exit code", "rank 1: the script ended with exit code 3"),
        ("too late", "not all ranks came to their end within 3 s of rank 0's"),
        ("interrupted", "rank 1: an error interrupted the pipe"),
        ("no process group", "the script destroyed the process group first"),
    ],
)
def test_where_it_cannot_one_line_says_why_and_what_to_do(how, reason, outcomes):
    first, second = outcomes
    version, in_flight, seconds, *_ = first.value[how]
    assert (version, in_flight) == (calls(how) - 1, 1)
    assert seconds < 20, "nothing hangs"
    [line] = re.findall(r".*update is lost.*", printed(first, how))
    assert reason in line
    assert "engine.destroy()" in line
    assert "lost" not in printed(second, how)
    assert ("waits at its end for the other ranks, at most 3 s" in printed(first, how)) == (how == "too late")


def test_a_printed_line_comes_at_the_next_update_and_the_last_one_at_the_end(outcomes):
    """The first stage applies update n - 1 in call n: that of update 2 is due in call 4, the last one at the end."""
    lines = [line for line in printed(outcomes[0], "together").splitlines() if re.match("steps|call", line)]
    assert [re.match(r"steps: \d|call \d", line)[0] for line in lines] == [
        *("call 1", "call 2", "call 3", "steps: 2", "call 4", "steps: 4"),
    ]


def test_an_update_that_was_applied_is_printed_although_the_next_one_is_lost(outcomes):
    lines = [line for line in printed(outcomes[0], "an exception").splitlines() if re.match("steps|call", line)]
    assert [line.partition(" loss")[0] for line in lines[2:]] == ["call 3 is over", "steps: 2"]

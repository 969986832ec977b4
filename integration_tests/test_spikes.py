"""The guard of the loss: where it jumps, the pipe is emptied, updates run 1F1B, and PACI goes on.

What an engine must do is written for the reference as a script: its schedule changes at the calls that the rule of the
documents gives, which `plan` works out from the losses of the reference itself.
"""

import dataclasses
import statistics

import pytest
from torch.nn.parallel import DistributedDataParallel

from integration_tests.megatron_checks import EXACT, assert_equal
from testing import deepspeed_job, megatron_job, ranks, torch_job
from testing.jobs import Job
from testing.megatron_model import GptJob
from testing.reference import megatron as megatron_reference
from testing.reference.deepspeed import Reference

BATCHES, WINDOW, STEPS = 56, 32, 5


def plan(losses_of, rise, late, empties):
    """The schedule of every batch, and how often the loss has jumped.

    Args:
        losses_of: the mean loss of every update, given the schedules of the batches.
        rise: how much a loss may be above the median.
        late: batches that are taken in after an update's own until it is judged.
        empties: batches that run under PACI until the pipe is empty.
    """
    schedules, judged, spikes = ["paci"] * BATCHES, 0, 0
    while True:
        losses = losses_of(schedules)
        seen = [batch for batch in range(BATCHES) if schedules[batch] == "paci"]
        for place in range(max(judged, WINDOW), len(seen) - late):
            usual = statistics.median(losses[batch] for batch in seen[place - WINDOW : place])
            begin = seen[place + late] + 1 + empties
            if losses[seen[place]] - usual > rise and begin < BATCHES:
                break
        else:
            return schedules, spikes
        schedules[begin : begin + STEPS] = ["1f1b"] * len(schedules[begin : begin + STEPS])
        judged, spikes = place + 1 + empties, spikes + 1


def guarded(rise):
    return {"paci": {"loss_spike": rise, "loss_spike_flush_steps": STEPS}}


JOBS = {
    "P=3 a=1": Job(stages=3, accumulation=1, script=(), config=guarded(0.035)),
    "P=3 a=3, tied": Job(stages=3, accumulation=3, script=(), model="tied", config=guarded(0.01)),
    "P=2 a=2, replicas": Job(stages=2, accumulation=2, script=(), config=guarded(0.01)),
}


def replicas_of(name):
    return 2 if "replicas" in name else 1


def script_of(schedules):
    script, before = [], "paci"
    for each in schedules:
        script += [f"schedule={each}"] * (each != before) + ["train"]
        before = each
    return tuple(script)


def expected(name):
    """The job with its script, and what the reference comes to after each batch."""
    job, replicas = JOBS[name], replicas_of(name)

    def losses_of(schedules):
        moments = Reference(dataclasses.replace(job, script=script_of(schedules)), replicas).run()
        return [moment.loss[-1] for moment in moments if moment.action == "train"]

    late = 1 + -(-(job.stages - 1) // job.accumulation)
    schedules, spikes = plan(losses_of, job.options["loss_spike"], late, 0)
    moments = Reference(dataclasses.replace(job, script=(*script_of(schedules), "drain")), replicas).run()
    assert spikes, "the loss of this job does not jump"
    assert "paci" in schedules[schedules.index("1f1b") :]
    return schedules, [moment for moment in moments if "=" not in moment.action]


def ddp(module, group):
    return DistributedDataParallel(module, process_group=group)


def train_replica(job):
    engine = deepspeed_job.build(job)
    return deepspeed_job.follow(engine, job.of_replica(engine.grid.get_data_parallel_rank()))


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        ("deepspeed", "P=3 a=1"),
        ("deepspeed", "P=2 a=2, replicas"),
        ("torch", "P=2 a=2, replicas"),
        *(pytest.param(framework, "P=3 a=3, tied", marks=pytest.mark.slow) for framework in ("deepspeed", "torch")),
    ],
)
def test_every_stage_falls_back_to_1f1b_at_the_same_update(framework, name):
    job = dataclasses.replace(JOBS[name], script=(f"train x{BATCHES}", "drain"))
    replicas = replicas_of(name)
    _, moments = expected(name)
    if framework == "deepspeed":
        by_rank = ranks.run_ranks(train_replica, job.stages * replicas, (job,))
        by_replica = [by_rank[replica::replicas] for replica in range(replicas)]
    else:
        [by_rank] = torch_job.run_all((job, {"wrap": ddp if replicas > 1 else None}), replicas=replicas)
        by_replica = [by_rank[start : start + job.stages] for start in range(0, len(by_rank), job.stages)]
    for results in by_replica:
        for stage, result in enumerate(results if framework == "torch" else ()):
            for moment, truth in zip(result["moments"], moments, strict=True):
                moment["loss"] = truth.loss[stage]  # the schedule's is the replica's own
        deepspeed_job.assert_equal(results, moments)


@pytest.mark.parametrize("framework", ["deepspeed", "torch"])
def test_a_resumed_run_falls_back_as_if_it_had_not_stopped(framework, tmp_path):
    """Saved and loaded every few batches: before there is a median, before a judgement, while it flushes."""
    job = dataclasses.replace(
        JOBS["P=2 a=2, replicas"],
        clip=0.6,
        script=(*("train x5", "drain", "save", "load") * (BATCHES // 5), "train", "drain"),
    )
    straight = dataclasses.replace(job, script=tuple(action for action in job.script if action != "load"))
    if framework == "deepspeed":
        resumed, whole = deepspeed_job.run_all(*((each, "paci", {"folder": str(tmp_path)}) for each in (job, straight)))
    else:
        resumed, whole = torch_job.run_all((job, {}), (straight, {}))
    for mine, other in zip(resumed, whole, strict=True):
        moments = [moment for moment in mine["moments"] if moment["action"] != "load"]
        flushed = [moment["stats"]["in_flight"] == 0 for moment in moments if moment["action"] == "train"]
        assert other["stage"] or 0 < sum(flushed) < BATCHES - WINDOW
        for moment, truth in zip(moments, other["moments"], strict=True):
            assert_equal(moment["weights"], truth["weights"], moment["action"])


# ---- Megatron --------------------------------------------------------------------------------------------------------

GPT = GptJob(stages=2, accumulation=1, calls=BATCHES, tied=True, clip_grad=0.4, paci=guarded(0.03)["paci"])


def plan_gpt(job):
    """What one process does: the reference, trained once for every jump of the loss."""

    def train(schedules):
        [stages] = megatron_reference.train_all([dataclasses.replace(job, schedules=tuple(schedules))])
        return stages

    schedules, spikes = plan(
        lambda schedules: [statistics.fmean(window) for window in train(schedules)[-1].losses],
        job.paci["loss_spike"],
        late=2,
        empties=1,
    )
    return spikes, schedules, train(schedules)


@EXACT
def test_megatron_falls_back_after_an_end_that_it_plans():
    """So does a run that is resumed while it flushes."""
    [(spikes, schedules, expected)] = ranks.run_ranks(plan_gpt, 1, (GPT,))
    assert spikes > 1, "the loss of this job does not jump"
    resumed = dataclasses.replace(GPT, resume_after=schedules.index("1f1b") + 2)
    by_rank = ranks.run_ranks(megatron_job.train_all, 2, ([GPT, resumed],))
    for (mine, other), truth in zip(by_rank, expected, strict=True):
        assert_equal(mine.weights, truth.weights, "weight")
        assert_equal(other.weights, truth.weights, "weight of the resumed run")
        assert mine.norms == other.norms == truth.norms
        assert mine.stats["drift_histogram"] == {drift: truth.drift.count(drift) for drift in set(truth.drift)}
    for run in by_rank[-1]:
        assert run.losses == expected[-1].losses

"""What a training loop does beside training: losses beside the loss, data that disagrees, the end."""

import dataclasses
import re

import pytest
import torch

from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference import deepspeed as reference

NAMED = pytest.mark.skipif(ranks.backend(3) != "gloo", reason="on NCCL nothing is raised: its watchdog ends the job")

JOB = Job(stages=3, accumulation=2, script=("train x3",))


def end(job):
    """Train, and destroy the engine: where the stage stands before and after."""
    engine = deepspeed_job.build(job)
    feed = jobs.data(job.model)
    for _ in range(3):
        engine.train_batch(feed)
    before = engine.pipeline_stats()
    engine.destroy()
    after = engine.pipeline_stats()
    return [(stats["version"], stats["in_flight"]) for stats in (before, after)], deepspeed_job.weights(engine)


def test_the_end_of_training_drains():
    truth = reference.run(dataclasses.replace(JOB, script=("train x3", "drain")))[-1]
    for stage, (stands, weights) in enumerate(ranks.run_ranks(end, 3, (JOB,))):
        assert stands == [([2, 2, 3][stage], 2 - stage), (3, 0)]
        assert all(torch.equal(weights[name], value) for name, value in truth.weights[stage].items())


def train_after(job, evaluate):
    """Three batches, after an evaluation or without; the losses of the last stage and the weights."""
    engine = deepspeed_job.build(job)
    if evaluate:
        engine.eval_batch(jobs.data(job.model), compute_loss=False, reduce_output=None)
    feed = jobs.data(job.model)
    losses = [engine.train_batch(feed).item() for _ in range(3)]
    engine.drain()
    return losses[-1], deepspeed_job.weights(engine)


def both_ways(job):
    return train_after(job, True), train_after(job, False)


def test_an_evaluation_without_a_loss_does_not_take_it_from_training():
    for (loss, weights), (truth, unseen) in ranks.run_ranks(both_ways, 2, (dataclasses.replace(JOB, stages=2),)):
        assert loss == truth
        assert all(torch.equal(weights[name], value) for name, value in unseen.items())


# ---- what is trained ------------------------------------------------------------------------------------------------


def unfreeze(job):
    """The first layer of every stage is frozen, until the fourth batch."""
    engine = deepspeed_job.build(job)
    feed = jobs.data(job.model)
    first = engine.module.forward_funcs[0]
    first.requires_grad_(False)
    for _ in range(3):
        engine.train_batch(feed)
    with engine.drained():
        first.requires_grad_(True)
    for _ in range(3):
        engine.train_batch(feed)
    engine.drain()
    return deepspeed_job.weights(engine)


def test_what_is_trained_may_change_while_the_pipe_is_empty():
    job = dataclasses.replace(JOB, script=("train x3", "drain"), optimizer="sgd")
    truth = reference.Reference(job)
    firsts = [next(stage.module.children()) for stage in truth.stages]
    before = [[weight.detach().clone() for weight in first.parameters()] for first in firsts]
    for first in firsts:
        first.requires_grad_(False)
    truth.run()
    assert all(
        torch.equal(weight, old)
        for first, weights in zip(firsts, before, strict=True)
        for weight, old in zip(first.parameters(), weights, strict=True)
    )
    for first in firsts:
        first.requires_grad_(True)
    last = [truth.act(action) for action in ("train", "train", "train", "drain")][-1]
    for stage, weights in enumerate(ranks.run_ranks(unfreeze, 3, (job,))):
        assert all(torch.equal(weights[name], value) for name, value in last.weights[stage].items())


# ---- data that the first and the last stage do not share ------------------------------------------------------------


def disagree(job):
    """Every stage but the last has endless data; the last has a batch and a half."""
    engine = deepspeed_job.build(job)
    feed = jobs.data(job.model)
    if engine.is_last_stage():
        feed = iter([next(feed) for _ in range(3)])
    for _ in range(4):
        engine.train_batch(feed)


@NAMED
def test_a_last_stage_without_data_says_so_and_the_others_end():
    job = dataclasses.replace(JOB, config={"paci": {"timeout": 5}})
    outcomes = ranks.gather_outcomes(disagree, 3, (job,), timeout=60)
    assert [outcome.raised[0] for outcome in outcomes] == ["LinkError", "LinkError", "DataEndedError"]
    assert "ended after 1 of 2 micro-batches" in outcomes[2].error
    assert "stage 2" in re.search(r"LinkError: (.*)", outcomes[1].error)[1]


# ---- losses beside the loss -----------------------------------------------------------------------------------------


def train_with_two_losses(schedules):
    """The loss and the additional loss of every `train_batch`, by schedule; under PACI those of a drain too."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    import paci_schedule

    class Two(PipelineModule):
        size = torch.zeros(())

        def get_additional_losses(self):
            return {"size": self.size}

    paci_schedule.register("deepspeed")
    deepspeed.init_distributed(verbose=False)
    job, told = Job(stages=2, accumulation=3, script=()), {}

    def loss(outputs, labels):
        Two.size = outputs.detach().abs().mean()
        return jobs.loss(outputs, labels)

    for schedule in schedules:
        module = Two(jobs.layers(job.model), num_stages=2, partition_method="uniform", loss_fn=loss)
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=jobs.optimizer(job),
            config=deepspeed_job.config(job, schedule),
            model_parameters=list(module.parameters()),
        )
        feed, rows = jobs.data(job.model), []
        for _ in range(3):
            losses = [engine.train_batch(feed)]
            beside = [engine.get_additional_losses()]
            if schedule == "paci":
                losses.append(engine.drain())
                beside.append(engine.get_additional_losses())
            rows.append([(float(loss), float(one["size"])) for loss, one in zip(losses, beside, strict=True)])
        told[schedule] = rows
    return told


def test_additional_losses_are_averaged_as_the_loss_is():
    """The last stage has the batch's own at once; the first, of two micro-batches, and of the third in the drain."""
    first, last = ranks.run_ranks(train_with_two_losses, 2, (("paci", "1f1b"),))
    for rows, truth in zip(last["paci"], last["1f1b"], strict=True):
        assert rows[0] == pytest.approx(truth[0], rel=1e-6)
    for rows, truth in zip(first["paci"], first["1f1b"], strict=True):
        mean = [(2 * early + late) / 3 for early, late in zip(*rows, strict=True)]
        assert mean == pytest.approx(truth[0], rel=1e-6)

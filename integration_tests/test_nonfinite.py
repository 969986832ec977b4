"""What is infinite or no number is an error that names stage and micro-batch, where the job asks for one."""

import dataclasses
import math

import pytest
import torch

from paci_schedule import NonfiniteError
from paci_schedule.runtime import finite
from testing import deepspeed_job, jobs, megatron_job, ranks, torch_job
from testing.jobs import Job
from testing.megatron_model import GptJob, set_up

JOB = Job(stages=3, accumulation=2, script=(), config={"paci": {"on_nonfinite": "raise", "timeout": 4}})


def spoil(engine, what):
    """Let one thing that stage 1 computes for micro-batch 3 be no number, or, at the last stage, the loss."""
    seen = []

    def once(tensor):
        seen.append(1)
        return tensor * math.nan if len(seen) == 4 else tensor

    if what == "activation" and engine.stage_id == 1:
        engine.module.forward_funcs[0].register_forward_hook(lambda _, __, output: once(output))
    if what == "gradient" and engine.stage_id == 1:
        engine.module.forward_funcs[0].register_forward_pre_hook(
            lambda _, inputs: inputs[0].register_hook(once) and None
        )
    if what == "loss" and engine.stage_id == 2:
        loss = engine.module.loss_fn
        engine.module.loss_fn = lambda *values: once(loss(*values))


def train_spoiled(job, what):
    engine = deepspeed_job.build(job)
    spoil(engine, what)
    feed = jobs.data(job.model)
    losses = [engine.train_batch(feed).item() for _ in range(6)]
    engine.drain()
    return losses


@pytest.mark.parametrize(
    ("what", "stage", "said"),
    [
        ("activation", 1, "the activation of micro-batch 3"),
        ("gradient", 1, "the gradient of micro-batch 3"),
        ("loss", 2, "the loss of micro-batch 3"),
        ("weight", 0, "a weight after the newest update"),
    ],
)
def test_each_kind_is_named_where_it_arises(what, stage, said):
    job = dataclasses.replace(JOB, poison=(0, 3, 0) if what == "weight" else None)
    outcomes = ranks.gather_outcomes(train_spoiled, 3, (job, what), timeout=90, grace=30)
    assert outcomes[stage].raised[:1] == ("NonfiniteError",), outcomes
    assert f"stage {stage} (rank {stage}): {said} is not finite: its largest element is " in outcomes[stage].error
    assert not any("NonfiniteError" in outcome.raised for outcome in outcomes if outcome.rank != stage)


def test_without_the_option_the_job_trains_on_as_deepspeed_does():
    job = dataclasses.replace(JOB, config={})
    losses = ranks.run_ranks(train_spoiled, 3, (job, "activation"))
    assert all(math.isnan(each[-1]) for each in losses)


def train_megatron_spoiled(job):
    from megatron.core import parallel_state

    megatron_job.prepare()
    set_up(job)

    def build_stage(job):
        model, optimizer = megatron_job.wired(job)
        if parallel_state.get_pipeline_model_parallel_rank() == 1:
            with torch.no_grad():
                next(model.parameters()).fill_(math.inf)
        return model, optimizer

    megatron_job.train(job, build_stage=build_stage)


def train_torch_spoiled(job):
    schedule, weights = torch_job.build(job)
    jobs.poison(job, schedule._stage.stage_index, list(weights.values()))
    feed = jobs.data(job.model)
    for _ in range(4):
        args, target = torch_job.whole_batch([next(feed) for _ in range(job.accumulation)])
        schedule.step(*(args if schedule._stage.is_first else ()), target=target if schedule._stage.is_last else None)


def test_megatron_names_the_stage():
    job = GptJob(stages=2, accumulation=2, calls=3, paci={"on_nonfinite": "raise", "timeout": 4})
    first, second = ranks.gather_outcomes(train_megatron_spoiled, 2, (job,), timeout=120, grace=30)
    assert second.raised[:1] == ("NonfiniteError",), second
    assert "stage 1 (rank 1): the loss of micro-batch 0 is not finite" in second.error
    assert "NonfiniteError" not in first.raised


def test_pytorch_s_schedule_names_the_stage():
    first, second = ranks.gather_outcomes(
        train_torch_spoiled, 2, (dataclasses.replace(JOB, stages=2, poison=(1, 3, 0)),), timeout=90, grace=30
    )
    assert second.raised[:1] == ("NonfiniteError",), second
    assert "stage 1 (rank 1): a weight after the newest update is not finite" in second.error
    assert "NonfiniteError" not in first.raised


def test_what_the_device_has_not_said_is_waited_for_only_where_the_pipe_is_empty(monkeypatch):
    guard = finite.FiniteGuard(5)
    monkeypatch.setattr(finite.dist, "get_rank", lambda: 7)
    guard.look("the loss", [torch.ones(2), torch.arange(3), torch.empty(0)])
    with pytest.raises(NonfiniteError, match=r"stage 5 \(rank 7\): the loss is not finite: its largest element is nan"):
        guard.look("the loss", [torch.tensor([1.0, math.nan], dtype=torch.bfloat16)])
    monkeypatch.setattr(finite.HostCopy, "has_arrived", lambda _: False)
    monkeypatch.setattr(finite.HostCopy, "numbers", lambda _: pytest.fail("waited"))
    guard.look("the loss", [torch.tensor(-math.inf)])
    monkeypatch.undo()
    monkeypatch.setattr(finite.dist, "get_rank", lambda: 7)
    with pytest.raises(NonfiniteError, match="inf"):
        guard.settle()
    guard.settle()

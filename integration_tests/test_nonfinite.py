"""What is infinite or no number is an error that names stage and micro-batch, where the job asks for one."""

import dataclasses
import itertools
import math

import pytest
import torch

from paci_schedule import NonfiniteError
from paci_schedule.runtime import finite
from testing import deepspeed_job, jobs, megatron_job, ranks, torch_job
from testing.jobs import Job
from testing.megatron_model import GptJob, set_up
from testing.reference.deepspeed import Reference

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_floating_type_can_be_looked_at(dtype, monkeypatch, caplog):
    monkeypatch.setattr(finite.dist, "get_rank", lambda: 7)
    gradients = [torch.full((3,), 2.0, dtype=dtype), torch.eye(2, dtype=torch.float32).to_sparse()]
    finite.FiniteGuard(5).look("the loss", gradients[:1])
    assert finite.may_step(5, gradients, torch.device("cpu"))
    assert not finite.may_step(5, [*gradients, torch.full((1,), math.inf, dtype=dtype)], torch.device("cpu"))
    assert "stage 5 (rank 7) leaves out an update: its gradient is not finite" in caplog.text


# ---- updates that are left out ---------------------------------------------------------------------------------------

SKIP = {"paci": {"on_nonfinite": "skip"}}
SKIPPING = {
    "rates": Job(stages=3, accumulation=2, script=("train x6", "drain"), poison=(1, 5, 0), config=SKIP, warmup=True),
    "clipped": Job(stages=3, accumulation=1, script=("train x6", "drain"), poison=(0, 3, 1), config=SKIP, clip=0.6),
    "tied": Job(stages=3, accumulation=2, script=("train x5", "drain"), poison=(0, 3, 0), config=SKIP, model="tied"),
}


FLUSHED = Job(
    stages=3,
    accumulation=2,
    script=("train x5",),
    poison=(1, 5, 0),
    clip=0.6,
    config={"paci": {"on_nonfinite": "skip", "flush_warmup_steps": 99}},
)


@pytest.fixture(scope="module")
def skipped():
    skipping = {**SKIPPING, "flushed": FLUSHED}
    calls = [dataclasses.replace(job, config={}) for job in SKIPPING.values()]
    results = deepspeed_job.run_all(*((job, "paci", {}) for job in (*skipping.values(), *calls)))
    names = [*skipping, *(f"{name}, ignored" for name in SKIPPING)]
    on_torch = torch_job.run_all(*((job, {}) for job in skipping.values()))
    names += [f"{name}, torch" for name in skipping]
    return dict(zip(names, [*results, *on_torch], strict=True))


@pytest.mark.parametrize("name", SKIPPING)
def test_a_stage_leaves_out_the_update_whose_gradient_is_not_finite(skipped, name):
    """As the reference leaves it out, to the bit; a stage with a tied weight leaves out elements."""
    deepspeed_job.assert_as_reference(SKIPPING[name], skipped[name])
    expected = Reference(SKIPPING[name]).run()
    on_torch = skipped[f"{name}, torch"]
    for stage, result in enumerate(on_torch):
        for moment, truth in zip(result["moments"], expected, strict=True):
            moment["loss"] = truth.loss[stage]  # the first calls tell of none at the first stage
    deepspeed_job.assert_equal(on_torch, expected)


@pytest.mark.parametrize("name", ["flushed", "flushed, torch"])
def test_where_a_norm_is_summed_over_all_stages_all_of_them_leave_the_update_out(skipped, name):
    for result in skipped[name]:
        weights = [list(moment["weights"].values()) for moment in result["moments"]]
        changes = [not all(map(torch.equal, *pair)) for pair in itertools.pairwise(weights)]
        assert changes == [True, False, True, True]  # the third update of five
        assert all(weight.isfinite().all() for weight in weights[-1])


@pytest.mark.parametrize("name", ["rates", "clipped"])
def test_without_the_option_such_an_update_spoils_the_weights(skipped, name):
    last = [result["moments"][-1]["weights"] for result in skipped[f"{name}, ignored"]]
    assert not all(weight.isfinite().all() for weights in last for weight in weights.values())


def train_megatron_skipping(job):
    """The weights of this stage before every call and at the end, and the norms that the optimizer told."""
    from megatron.core import parallel_state

    megatron_job.prepare()
    set_up(job)
    built, backwards, weights = [], [], []

    def spoil(gradient):
        backwards.append(1)
        return gradient * math.inf if len(backwards) == 4 else gradient

    def build_stage(job):
        model, optimizer = megatron_job.wired(job)
        built.append(model)
        if parallel_state.get_pipeline_model_parallel_rank() == 0 and parallel_state.get_data_parallel_rank() == 0:
            next(weight for weight in model.parameters() if weight.dim() > 1).register_hook(spoil)
        return model, optimizer

    def keep(call=None):
        weights.append([weight.detach().clone() for weight in built[0].parameters()])

    trained = megatron_job.train(job, keep, build_stage)
    keep()
    return weights, trained.norms


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize(
    "job",
    [
        GptJob(
            stages=2, accumulation=2, calls=4, clip_grad=0.4, data_parallel=2, bf16=True, distributed_optimizer=True
        ),
        GptJob(stages=2, accumulation=2, calls=4, tied=True),
    ],
    ids=["clipped", "tied"],
)
def test_megatron_leaves_out_the_update_on_all_ranks_of_the_stage(job, flushed):
    """Of all stages, under a flush."""
    job = dataclasses.replace(job, paci={"on_nonfinite": "skip", "flush_warmup_steps": 9 * flushed})
    for rank, (weights, norms) in enumerate(ranks.run_ranks(train_megatron_skipping, 2 * job.data_parallel, (job,))):
        first = rank < job.data_parallel
        changes = [not all(map(torch.equal, *pair)) for pair in itertools.pairwise(weights)]
        skips = flushed or (first and not job.tied)  # the second update of four
        assert changes == [True, not skips, True, True]
        assert [norm is None for norm in norms] == [False, skips, False, False]
        assert all(weight.isfinite().all() for each in weights for weight in each)

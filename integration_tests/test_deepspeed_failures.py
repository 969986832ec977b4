"""Data that ends, loops that call a stage alone, and ranks that die or hang: every rank hears of it, and none hangs."""

import os
import re
import time

import pytest
import torch

from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference.deepspeed import run as reference_of

JOB = Job(stages=2, accumulation=2, script=("train",))


# ---- data that ends -------------------------------------------------------------------------------------------------


def run_out(job, micro_batches, folder):
    """Train on a finite iterator until it ends; what the last call raised, and what the engine is like afterwards."""
    engine = deepspeed_job.build(job)
    source = jobs.data(job.model)
    feed = iter([next(source) for _ in range(micro_batches)])
    calls = 0
    while True:
        try:
            engine.train_batch(feed)
            calls += 1
        except StopIteration as ended:
            raised = [cls.__name__ for cls in type(ended).__mro__]
            message = str(ended)
            break
    stats, weights, untold = engine.pipeline_stats(), deepspeed_job.weights(engine), len(engine._runner.untold)
    engine.save_checkpoint(folder, tag="common")
    after = engine.train_batch(jobs.data(job.model, first=100)), engine.drain(), engine.pipeline_stats()["version"]
    return {
        **{"calls": calls, "raised": raised, "message": message, "stats": stats, "weights": weights},
        **{"on": after[2], "untold": untold},
    }


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize(("accumulation", "left_over"), [(3, 0), (3, 1), (3, 2), (1, 0)])
def test_data_that_ends_drains_and_says_so_on_every_rank(stages, accumulation, left_over, tmp_path):
    """Two whole batches, and the start of a third or none of it.  The two count, once each; the rest does not."""
    job = Job(stages=stages, accumulation=accumulation, script=("train x2", "drain"))
    results = ranks.run_ranks(run_out, stages, (job, 2 * accumulation + left_over, str(tmp_path)))
    truth = reference_of(job)[-1]
    for stage, result in enumerate(results):
        assert result["calls"] == 2
        assert result["raised"][0] == "DataEndedError"
        assert "StopIteration" in result["raised"]
        assert str(accumulation) in result["message"]
        assert result["stats"]["in_flight"] == 0
        assert result["stats"]["version"] == 2
        assert result["untold"] == stages - 1 - stage, "the losses of the drain count in what the next call returns"
        assert all((result["weights"][name] == value).all() for name, value in truth.weights[stage].items())
        assert result["on"] == 3
    resumed = deepspeed_job.run(
        Job(stages=stages, accumulation=accumulation, script=("drain",)), folder=str(tmp_path), load=True
    )
    for stage, result in enumerate(resumed):
        weights = result["moments"][0]["weights"]
        assert all((weights[name] == value).all() for name, value in truth.weights[stage].items())


def give_loaders(job):
    """Loaders where iterators belong, refused; then a batch of a loader's iterator; then loaders, but at stage 1."""
    from paci_schedule import ConfigError

    engine = deepspeed_job.build(job)
    source = jobs.data(job.model)
    loader = torch.utils.data.DataLoader([next(source) for _ in range(4)], batch_size=None)
    for call in (engine.train_batch, engine.eval_batch):
        with pytest.raises(ConfigError, match=r"data_iter=DataLoader: .* iter\(loader\), or .*RepeatingLoader"):
            call(loader)
    assert engine.pipeline_stats()["forwards"] == 0
    engine.train_batch(iter(loader))
    engine.drain()
    assert engine.global_steps == 1
    engine.train_batch(None if engine.stage_id == 1 else loader)


def test_a_loader_is_no_iterator_and_is_refused():
    """The error comes where the loader is given, before anything runs; a stage that is given none does not hang."""
    job = Job(stages=3, accumulation=2, script=(), config={"paci": {"timeout": 10}})
    outcomes = ranks.gather_outcomes(give_loaders, 3, (job,), timeout=60)
    assert [outcome.raised[0] for outcome in outcomes] == ["ConfigError", "LinkError", "ConfigError"], outcomes


def hand_over_garbage(job):
    engine = deepspeed_job.build(job)
    engine.train_batch(iter(lambda: "nonsense", None))


def test_an_iterator_that_raises_something_else_is_not_swallowed():
    outcomes = ranks.gather_outcomes(
        hand_over_garbage, 2, (Job(stages=2, accumulation=2, script=(), config={"paci": {"timeout": 5}}),), timeout=60
    )
    assert all(outcome.ended == "raised" for outcome in outcomes)


# ---- ranks that die or hang -----------------------------------------------------------------------------------------

TIMEOUT = 5.0


def train_until_it_fails(engine, job):
    """Print how long that took."""
    feed = jobs.data(job.model)
    started = time.monotonic()
    try:
        for _ in range(50):
            engine.train_batch(feed)
    finally:
        print(f"waited {time.monotonic() - started:.3f}")


def lose_stage_one(job, how, at):
    """Train; stage 1 stops in its forward number `at`; 0: before it has passed on that there is a batch."""
    engine = deepspeed_job.build(job)
    if engine.stage_id == 1 and at == 0:
        os._exit(9)
    if engine.stage_id == 1:
        forwards = []

        def stop(*_):
            forwards.append(1)
            if len(forwards) == at:
                if how == "dies":
                    os._exit(9)
                if how == "raises":
                    raise ZeroDivisionError("stage one cannot go on")
                time.sleep(600)

        engine.module.forward_funcs[0].register_forward_pre_hook(stop)
    train_until_it_fails(engine, job)


@pytest.mark.parametrize(("how", "at"), [("dies", 0), ("dies", 1), ("dies", 6), ("raises", 6), ("hangs", 7)])
def test_a_lost_stage_ends_the_others_within_the_timeout(how, at):
    job = Job(stages=3, accumulation=2, script=(), config={"paci": {"timeout": TIMEOUT}})
    # A stage that hangs is the last to end: once the first of the others has given up, they all have.
    grace = 6.0 if how == "hangs" else TIMEOUT + 15
    outcomes = ranks.gather_outcomes(lose_stage_one, 3, (job, how, at), timeout=60, grace=grace)
    assert outcomes[1].ended == {"dies": "died", "hangs": "killed", "raises": "raised"}[how]
    for rank in (0, 2):
        outcome = outcomes[rank]
        assert outcome.ended == "raised", outcome
        assert outcome.raised[0] == "LinkError", outcome.error
        message = outcome.error.split("LinkError: ", 1)[1]
        assert f"stage {rank}" in message
        assert "stage 1" in message
        # A message's op; the first op of the batch where the word that there is one did not come.
        assert re.search(r"\b([ERS][AG]|F)\d+\b", message), message
        waited = float(outcome.output.rsplit("waited ", 1)[1].split()[0])
        assert waited < TIMEOUT + 15  # the job itself takes a moment, on a busy machine several


def lose_before_an_update(job, how, lost, schedule):
    """Train; the rank `lost` stops before it updates for the third time."""
    engine = deepspeed_job.build(job)
    engine.set_pipeline_schedule(schedule)
    if torch.distributed.get_rank() == lost:
        take_update = engine.take_update

        def stop(*args):
            if engine.global_steps == 2:
                os._exit(9) if how == "dies" else time.sleep(600)
            take_update(*args)

        engine.take_update = stop
    train_until_it_fails(engine, job)


def outcomes_of_the_others(world_size, how, lost, schedule="paci", **options):
    """The outcomes of the other ranks, whose errors name the op that a stage waited for, within the timeout."""
    config = {"paci": {"timeout": 3, "clip": "global"}, **options.pop("config", {})}
    job = Job(stages=2, accumulation=1, script=(), config=config, **options)
    args = job, how, lost, schedule
    grace = 3 if how == "hangs" else 15
    outcomes = ranks.gather_outcomes(lose_before_an_update, world_size, args, timeout=60, grace=grace)
    assert outcomes.pop(lost).ended == {"dies": "died", "hangs": "killed"}[how]
    for outcome in outcomes:
        assert outcome.raised[:1] == ("LinkError",), outcome
        message = outcome.error.rpartition("LinkError: ")[2]
        assert f"stage {outcome.rank * 2 // world_size} (rank {outcome.rank})" in message
        assert re.search(r"\b([ERS][AG]|F|B|STEP)\d+\b", message), message
        assert float(outcome.output.rsplit("waited ", 1)[1].split()[0]) < 3 + 15
    return outcomes


@pytest.mark.parametrize(("how", "lost"), [("dies", 0), ("dies", 3), ("hangs", 3)])
def test_a_lost_replica_ends_the_others_within_the_timeout(how, lost):
    beside = next(o for o in outcomes_of_the_others(4, how, lost) if o.rank == lost ^ 1)
    assert re.search(rf"\(STEP2\) together with the replicas of this stage \(rank {lost}\)", beside.error)


@pytest.mark.parametrize("precision", ["bf16", "bf16-bf16"])
def test_a_lost_replica_ends_the_others_whatever_the_optimizer(precision):
    beside = outcomes_of_the_others(
        4,
        "hangs",
        0,
        precision=precision,
        config={"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True},
    )[0]
    assert re.search(r"\(STEP2\) together with the replicas of this stage \(rank 0\)", beside.error)


def test_a_stage_that_is_lost_in_a_flush_ends_the_others_within_the_timeout():
    (first,) = outcomes_of_the_others(2, "hangs", 1, schedule="1f1b", clip=0.5)
    assert "(STEP0) together with the other stages and the slices of this stage (rank 1)" in first.error


def drain_alone(job, batches):
    """Stage 0 drains, stage 1 has gone to do something else."""
    engine = deepspeed_job.build(job)
    for _ in range(batches):
        engine.train_batch(jobs.data(job.model))
    if engine.stage_id == 1:
        time.sleep(600)
    engine.drain()


def evaluate_alone(job):
    engine = deepspeed_job.build(job)
    if engine.stage_id == 1:
        time.sleep(600)
    engine.eval_batch(jobs.data(job.model))


def test_an_evaluation_that_one_rank_misses_does_not_hang():
    job = Job(stages=2, accumulation=2, script=(), config={"paci": {"timeout": 3}})
    first, second = ranks.gather_outcomes(evaluate_alone, 2, (job,), timeout=60, grace=1)
    assert second.ended == "killed"
    assert first.raised[:1] == ("LinkError",), first
    assert "evaluated together with the other ranks of the job (rank 1)" in first.error


@pytest.mark.parametrize("batches", [1, 0], ids=["waits for a gradient", "waits for the norms"])
def test_a_drain_that_one_rank_misses_does_not_hang(batches):
    job = Job(stages=2, accumulation=2, script=(), clip=0.5, config={"paci": {"timeout": 4, "clip": "global"}})
    first, second = ranks.gather_outcomes(drain_alone, 2, (job, batches), timeout=60, grace=1)
    assert second.ended == "killed"
    assert first.raised[:1] == ("LinkError",), first
    assert "stage 0" in first.error.rpartition("LinkError: ")[2]

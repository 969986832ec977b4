"""What a Megatron job says where its ranks do not fit together, or where one stands still under Megatron's schedule."""

import os
import time
from argparse import Namespace

import pytest
import torch.distributed as dist

from paci_schedule.adapters.megatron.publishing import check_named
from paci_schedule.errors import CheckpointError
from testing import megatron_job
from testing.megatron_model import GptJob, set_up
from testing.ranks import gather_outcomes


def train_apart(job):
    """Rank 1 has another timeout and clips by stage."""
    megatron_job.prepare()
    set_up(job)

    def build_stage(job):
        model, optimizer = megatron_job.wired(job)
        if model.config.paci["clip"] == "global" and dist.get_rank() == 1:
            model.config.paci = {**job.paci, "clip": "stage"}
        return model, optimizer

    megatron_job.train(job, build_stage=build_stage)


def test_different_options_are_refused_on_both_ranks():
    job = GptJob(calls=1, paci={"clip": "global", "timeout": 20})
    for outcome in gather_outcomes(train_apart, 2, (job,), timeout=90, grace=30):
        assert outcome.raised[:1] == ("ConfigError",), outcome
        assert 'clip in config.paci is "global" on rank 0; "stage" on rank 1' in outcome.error


def train_until_it_fails(job, build_stage):
    """Print how long the last call took."""
    begun = []
    try:
        megatron_job.train(job, lambda _: begun.append(time.monotonic()), build_stage)
    finally:
        print(f"waited {time.monotonic() - begun[-1]:.1f}")


def hang(job, doing):
    """Rank 0 stands still in the forward of its evaluation, or of a call under 1F1B."""
    megatron_job.prepare()
    set_up(job)

    def build_stage(job):
        model, optimizer = megatron_job.wired(job)

        def stop(*_):
            if not model.training or (doing != "evaluated" and model.config.pipeline_schedule == "1f1b"):
                time.sleep(600)

        if dist.get_rank() == 0:
            model.module.register_forward_pre_hook(stop)
        return model, optimizer

    train_until_it_fails(job, build_stage)


JOBS = {
    "evaluated": GptJob(calls=2, evaluate_after=(2,), paci={"train_iters": 2, "timeout": 4}),
    "trained under 1f1b": GptJob(calls=2, schedules=("paci", "1f1b"), paci={"drain_interval": 1, "timeout": 4}),
}


@pytest.mark.parametrize("doing", JOBS)
def test_a_rank_that_hangs_in_megatrons_own_schedule_ends_the_others_within_the_timeout(doing):
    first, second = gather_outcomes(hang, 2, (JOBS[doing], doing), timeout=120, grace=2)
    assert first.ended == "killed", first
    assert second.raised[:1] == ("LinkError",), second.error
    assert f"stage 1 (rank 1) {doing}, and exchanged a message with the neighbouring stage (rank 0)" in second.error
    assert float(second.output.rsplit("waited ", 1)[1].split()[0]) < 30


def lose_replica(job, how, at):
    """Rank 3 is lost at its third forward, or before its third update."""
    megatron_job.prepare()
    set_up(job)
    seen = []

    def lose(*_):
        seen.append(1)
        if len(seen) == 3:
            os._exit(9) if how == "dies" else time.sleep(600)

    def build_stage(job):
        model, optimizer = megatron_job.wired(job)
        if dist.get_rank() == 3 and at == "forward":
            model.module.register_forward_pre_hook(lose)
        elif dist.get_rank() == 3:
            stock = optimizer.prepare_grads
            optimizer.prepare_grads = lambda: (lose(), stock())[1]
        return model, optimizer

    train_until_it_fails(job, build_stage)


@pytest.mark.parametrize(("how", "at"), [("dies", "forward"), ("hangs", "forward"), ("hangs", "update")])
def test_a_lost_replica_ends_the_others_within_the_timeout(how, at):
    job = GptJob(calls=5, data_parallel=2, distributed_optimizer=True, paci={"train_iters": 5, "timeout": 4})
    outcomes = gather_outcomes(lose_replica, 4, (job, how, at), timeout=120, grace=8)
    assert outcomes.pop(3).ended == {"dies": "died", "hangs": "killed"}[how]
    for outcome in outcomes:
        assert outcome.raised[:1] == ("LinkError",), outcome.error
        assert float(outcome.output.rsplit("waited ", 1)[1].split()[0]) < 30
    beside = outcomes[2].error.rpartition("LinkError: ")[2]
    assert beside.startswith("stage 1 (rank 2) worked (at "), beside
    assert "together with the other ranks of this stage (rank 3) and got no answer" in beside


def test_under_a_flush_a_lost_replica_is_named_among_all_that_are_waited_for():
    """Megatron-core's own schedule does not tell at which op it is, and waits for other stages too."""
    flushed = {"train_iters": 5, "timeout": 4, "flush_warmup_steps": 5}
    job = GptJob(calls=5, data_parallel=2, distributed_optimizer=True, paci=flushed)
    outcomes = gather_outcomes(lose_replica, 4, (job, "hangs", "update"), timeout=120, grace=8)
    assert outcomes.pop(3).ended == "killed"
    for outcome in outcomes:
        assert outcome.raised[:1] == ("LinkError",), outcome.error
        assert float(outcome.output.rsplit("waited ", 1)[1].split()[0]) < 30
    beside = outcomes[2].error.rpartition("LinkError: ")[2]
    named = "the other stages and the other ranks of this stage (ranks 0, 3)"
    assert beside.startswith(f"stage 1 (rank 2) worked together with {named} and got no answer"), beside


@pytest.mark.parametrize(
    ("content", "says"), [("", "is empty"), ("1" * 200, "more than 100 bytes"), ("a folder", "no regular file")]
)
def test_a_file_that_names_no_checkpoint_is_an_error_with_the_way_out(content, says, tmp_path):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.mkdir() if content == "a folder" else tracker.write_text(content)
    with pytest.raises(CheckpointError, match=f"{tracker}.*{says}.*--ckpt-step"):
        check_named(Namespace(load=str(tmp_path)))

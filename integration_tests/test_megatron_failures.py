"""What a Megatron job says where its ranks do not fit together, or where one stands still while it evaluates."""

import time

import torch.distributed as dist

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


def hang_in_the_evaluation(job):
    """Rank 0 stands still in the forward of its evaluation."""
    megatron_job.prepare()
    set_up(job)

    def build_stage(job):
        model, optimizer = megatron_job.wired(job)

        def stop(*_):
            if not model.training:
                time.sleep(600)

        if dist.get_rank() == 0:
            model.module.register_forward_pre_hook(stop)
        return model, optimizer

    megatron_job.train(job, build_stage=build_stage)


def test_a_rank_that_hangs_in_an_evaluation_ends_the_others_within_the_timeout():
    job = GptJob(stages=2, calls=2, evaluate_after=(2,), paci={"train_iters": 2, "timeout": 4})
    first, second = gather_outcomes(hang_in_the_evaluation, 2, (job,), timeout=120, grace=2)
    assert first.ended == "killed", first
    assert second.raised[:1] == ("LinkError",), second.error
    assert "stage 1 (rank 1) evaluated, and exchanged a message with the neighbouring stage (rank 0)" in second.error
    assert second.seconds < 60

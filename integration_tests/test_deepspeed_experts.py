"""Mixtures of experts inside a stage: as the reference under PACI, as stock under a flush, and what is refused."""

import dataclasses
import math
import re

import pytest
import torch
from torch import nn

from integration_tests.test_deepspeed_collectives import recorded
from paci_schedule.errors import UnsupportedError
from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference.deepspeed import Reference

SCRIPT = ("train x3", "drain", "train x2", "eval", "train x2", "drain")
PLAIN = Job(stages=2, accumulation=2, script=SCRIPT)
CLIPPED = dataclasses.replace(PLAIN, clip=0.4, warmup=True)
BF16 = dataclasses.replace(PLAIN, precision="bf16")
ZERO = {
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000},
    "zero_allow_untested_optimizer": True,
}
SHARDED = dataclasses.replace(PLAIN, precision="bf16-bf16", config=ZERO)
EVERYWHERE, FIRST = (2, 8), (2,)  # after which layers
SPREAD = dataclasses.replace(PLAIN, optimizer="sgd")


class Mixture(nn.Module):
    """Four experts, of which each token goes to one; as many as there is room for."""

    def __init__(self, width, size):
        from deepspeed.moe.layer import MoE

        super().__init__()
        expert = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        room = {"capacity_factor": 2.0, "eval_capacity_factor": 2.0, "min_capacity": 2}
        self.moe = MoE(width, expert, num_experts=4, ep_size=size, use_rts=False, **room)

    def forward(self, x):
        return x + self.moe(x)[0]


def layers(where, size=1):
    """Those of "words", with experts after some."""
    built = jobs.layers("words")
    for number in where:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(900 + number)
            built[number] = nn.Sequential(built[number], Mixture(built[number].value.out_features, size))
    return built


def build(job, schedule="paci", where=EVERYWHERE, size=1):
    """DeepSpeed's optimizers with masters want the experts' parameters in groups of their own."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    whole = jobs.parameter_groups
    with pytest.MonkeyPatch.context() as patch:
        if job.precision != "fp32":
            patch.setattr(jobs, "parameter_groups", lambda *of: split([{**each, "name": "all"} for each in whole(*of)]))
        return deepspeed_job.build(job, schedule, layers=layers(where, size))


def follow(job, folder=None, load=False, where=EVERYWHERE, size=1):
    """What a rank does with a job."""
    engine = build(job, where=where, size=size)
    if load:
        engine.load_checkpoint(folder, tag="common")
    return deepspeed_job.follow(engine, job.of_replica(engine.grid.get_data_parallel_rank()), folder)


def flushed(job, schedule, size=1):
    """Losses and weights after three batches that end with an empty pipe."""
    engine = build(job, "stock" if schedule == "stock" else "paci", size=size)
    if schedule != "stock":
        engine.set_pipeline_schedule(schedule)
    feed = jobs.data(job.model, job.of_replica(engine.grid.get_data_parallel_rank()).first_micro_batch)
    return [engine.train_batch(feed).item() for _ in range(3)], deepspeed_job.weights(engine)


def refusals():
    """What the engine says to jobs that it does not run."""
    said = []
    for job, size in (
        (dataclasses.replace(BF16, clip=0.4), 1),
        (dataclasses.replace(PLAIN, config={"paci": {"prediction": "window"}}), 1),
    ):
        with pytest.raises(UnsupportedError) as caught:
            build(job, size=size)
        said.append(str(caught.value))
    return said


BEFORE = dataclasses.replace(CLIPPED, script=("train x3", "save"))
AFTER = dataclasses.replace(CLIPPED, script=("train x3", "drain"), first_micro_batch=6)


def one_replica(folder):
    return {
        "clipped": follow(CLIPPED),
        "bf16": follow(BF16),
        "ZeRO-1": follow(SHARDED),
        "on one stage": follow(PLAIN, where=FIRST),
        "before": follow(BEFORE, folder),
        "after": follow(AFTER, folder, load=True),
        "refused": refusals(),
        **{("fp32", schedule): flushed(PLAIN, schedule) for schedule in ("stock", "1f1b", "zb-h1")},
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return ranks.run_ranks(one_replica, 2, (str(tmp_path_factory.mktemp("experts")),), timeout=200)


@pytest.mark.parametrize(
    ("name", "job", "where"),
    [
        ("clipped", CLIPPED, EVERYWHERE),
        ("bf16", BF16, EVERYWHERE),
        ("ZeRO-1", SHARDED, EVERYWHERE),
        ("on one stage", PLAIN, FIRST),
    ],
)
def test_experts_train_as_the_reference(name, job, where, alone):
    """Also where a stage has none, which makes DeepSpeed's own engine hang."""
    deepspeed_job.assert_as_reference(job, [result[name] for result in alone], layers=layers(where))


def test_a_resumed_run_with_experts_goes_on_bit_for_bit(alone):
    job = dataclasses.replace(CLIPPED, script=(*BEFORE.script, *AFTER.script))
    expected = Reference(job, layers=layers(EVERYWHERE)).run()[-len(list(AFTER.actions())) :]
    deepspeed_job.assert_equal([result["after"] for result in alone], expected, counters=False)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_under_a_flush_experts_train_as_under_stock(schedule, alone):
    for result in alone:
        (losses, weights), (truth, stock) = result["fp32", schedule], result["fp32", "stock"]
        assert losses == pytest.approx(truth, rel=3e-7)
        assert all(torch.equal(weights[name], value) for name, value in stock.items())


def test_what_experts_do_not_run_with_is_refused_on_every_rank(alone):
    for result in alone:
        clipped, predicted = result["refused"]
        assert '"gradient_clipping": 0.4 with deepspeed.moe.MoE layers' in clipped
        assert '"paci": {"clip": "stage"}' in clipped
        assert '"prediction": "off"' in predicted


# ---- two replicas ---------------------------------------------------------------------------------------------------


def two_replicas():
    heard = []
    with recorded(lambda name, members: heard.append((name, members))):
        engine = build(SPREAD, size=2)
        mine = SPREAD.of_replica(engine.grid.get_data_parallel_rank())
        result = {"spread": deepspeed_job.follow(engine, mine)}
        feed = jobs.data(mine.model, 5_000)
        heard.clear()
        for _ in range(2):
            engine.train_batch(feed)
        result["heard"] = list(heard)
    said = []
    with pytest.raises(UnsupportedError) as caught:
        build(CLIPPED, size=2)
    said.append(str(caught.value))
    return {
        **result,
        "whole": follow(CLIPPED),
        "refused": said,
        **{schedule: flushed(BF16, schedule, 2) for schedule in ("stock", "1f1b")},
    }


@pytest.fixture(scope="module")
def together():
    return ranks.run_ranks(two_replicas, 4, (), timeout=200)


@pytest.mark.slow
def test_replicas_with_the_same_experts_train_as_the_reference(together):
    expected = Reference(CLIPPED, 2, layers=layers(EVERYWHERE)).run()
    for replica in range(2):
        deepspeed_job.assert_equal([result["whole"] for result in together[replica::2]], expected)


@pytest.mark.slow
def test_experts_spread_over_replicas_train_as_whole_ones(together):
    """The reference has four experts on each replica; here a replica has two.  Tokens cross in another order: 1e-5."""
    expected = Reference(SPREAD, 2, layers=layers(EVERYWHERE)).run()
    for rank, result in enumerate(together):
        stage, replica = divmod(rank, 2)
        for moment, truth in zip(result["spread"]["moments"], expected, strict=True):
            assert math.isclose(moment["loss"], truth.loss[stage], rel_tol=1e-5) or math.isnan(truth.loss[stage])
            for name, value in moment["weights"].items():
                before, of_expert, rest = re.split(r"(_experts\.\d|$)", name, maxsplit=1)
                if of_expert:
                    of_expert = f"_experts.{int(of_expert[-1]) + 2 * replica}"
                assert torch.allclose(value, truth.weights[stage][before + of_expert + rest], atol=1e-5), name


@pytest.mark.slow
def test_under_a_flush_spread_experts_train_as_under_stock(together):
    for result in together:
        (losses, weights), (truth, stock) = result["1f1b"], result["stock"]
        assert losses == pytest.approx(truth, rel=3e-7)
        assert all(torch.equal(weights[name], value) for name, value in stock.items())


@pytest.mark.slow
def test_experts_speak_to_the_replicas_of_their_stage_alone(together):
    for rank, result in enumerate(together):
        heard = {(name, *members) for name, members in result["heard"]}
        stage = rank // 2
        assert any("all" in name and "to" in name for name, *_ in heard), heard
        assert {tuple(members) for _, *members in heard} <= {(rank,), (2 * stage, 2 * stage + 1)}


@pytest.mark.slow
def test_spread_experts_that_would_clip_apart_are_refused(together):
    for result in together:
        assert "ep_size=2: without masters a replica would clip" in result["refused"][0]

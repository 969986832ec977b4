"""The reference itself: drained after every batch it is stock 1F1B, undrained its drift is the closed form."""

import dataclasses

import pytest

from integration_tests import deepspeed_job, oracle
from integration_tests.jobs import Job
from paci_schedule import PipelineSpec
from paci_schedule.core.drift import drift_bound, drift_of

BATCHES = ("train x2", "eval", "train x2")
STOCK = {
    "one stage clips": Job(stages=1, accumulation=3, script=BATCHES, clip=0.85, warmup=True),
    "one stage clips, bf16": Job(stages=1, accumulation=3, script=BATCHES, clip=0.6, precision="bf16"),
    "one stage clips, bf16 sums": Job(stages=1, accumulation=4, script=BATCHES, clip=0.55, precision="bf16-bf16"),
    "fp32": Job(stages=2, accumulation=3, script=BATCHES, warmup=True),
    "fp32, two optimizer groups": Job(stages=3, accumulation=2, script=BATCHES, model="pairs", optimizer="groups"),
    "bf16": Job(stages=3, accumulation=2, script=BATCHES, model="pairs", precision="bf16", warmup=True),
    "bf16 on an fp32 wire": Job(
        stages=2,
        accumulation=3,
        script=BATCHES,
        precision="bf16",
        optimizer="groups",
        config={"communication_data_type": "fp32"},
    ),
    "bf16 sums": Job(stages=2, accumulation=3, script=BATCHES, precision="bf16-bf16", optimizer="sgd"),
}


def flushed(job):
    """The moments of a job whose pipe is drained after every batch; stock tells every stage the last stage's loss."""
    reference, moments = oracle.Reference(job), []
    for action in job.actions():
        moment = reference.act(action)
        if action == "train":
            drained = reference.act("drain")
            moment = dataclasses.replace(drained, action=action, loss=moment.loss[-1:] * job.stages)
        moments.append(moment)
    return moments


@pytest.mark.parametrize("name", STOCK)
def test_drained_after_every_batch_the_reference_is_stock_deepspeed(name):
    job = STOCK[name]
    deepspeed_job.assert_equal(deepspeed_job.run(job, schedule="stock"), flushed(job), counters=False)


@pytest.mark.parametrize("name", [name for name, job in STOCK.items() if job.clip])
def test_some_updates_are_clipped_and_some_are_not(name):
    reference = oracle.Reference(STOCK[name])
    reference.run()
    factors = reference.stages[0].factors
    assert min(factors) < 1 < max(factors)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-bf16"])
@pytest.mark.parametrize("model", ["words", "pairs", "hollow"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "groups"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_every_combination_is_stock_deepspeed(stages, optimizer, model, precision):
    job = Job(
        stages=stages,
        accumulation=3,
        script=BATCHES,
        model=model,
        precision=precision,
        optimizer=optimizer,
        clip=0.6 if stages == 1 else 0.0,
        warmup=True,
    )
    deepspeed_job.assert_equal(deepspeed_job.run(job, schedule="stock"), flushed(job), counters=False)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 7])
@pytest.mark.parametrize("extra", [0, 2])
def test_drift_and_versions_are_the_closed_form(stages, accumulation, extra):
    job = Job(
        stages=stages,
        accumulation=accumulation,
        script=("train x4", "drain", "train x3", "eval"),
        extra_in_flight=extra,
        optimizer="sgd",
    )
    spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
    end = oracle.run(job)[-1]
    for stage in range(stages):
        expected = [drift_of(spec, stage, m) for m in range(4 * accumulation)]
        expected += [drift_of(spec, stage, m) for m in range(3 * accumulation)]
        assert end.drift[stage] == expected
        assert max(expected) <= drift_bound(spec, stage)
        assert (end.version[stage], end.live[stage]) == (7, 0)
        assert end.peak[stage] == min(spec.in_flight(stage), 4 * accumulation)


def test_the_delay_matters():
    """What the equivalence tests compare is not what 1F1B would have made, at any stage."""
    job = Job(stages=3, accumulation=2, script=("train x4", "drain"))
    late, flush = oracle.run(job)[-1], flushed(dataclasses.replace(job, script=("train x4",)))[-1]
    for stage in range(3):
        assert any((late.weights[stage][name] != flush.weights[stage][name]).any() for name in late.weights[stage])

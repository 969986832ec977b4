"""Predicted weights on the real megatron-core: as other optimizers' steps on copies leave them; never shown."""

import dataclasses

import pytest
import torch

from integration_tests.megatron_checks import STOCK, assert_as_reference, assert_equal
from integration_tests.test_megatron_core import SWITCHED
from paci_schedule.core.drift import drift_of
from paci_schedule.core.spec import PipelineSpec
from testing.megatron_job import refusals, train_all, train_recorded, wired
from testing.megatron_model import GptJob
from testing.ranks import on_gpus, run_ranks

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from testing.reference import megatron as reference

EXACT = pytest.mark.skipif(on_gpus(1), reason="equality to the last bit is asked for on the CPU")


def predicting(prediction, plain, paci=(), **change):
    return dataclasses.replace(plain, **{**change, "paci": {"prediction": prediction, **dict(paci)}})


THREE = GptJob(stages=3, accumulation=2, calls=4)
STAGES = [
    predicting("every", THREE),
    predicting("window", THREE, clip_grad=0.2, accumulation=1),
    predicting(2, THREE, accumulation=3, bf16=True, optimizer="sgd"),
    predicting("window", THREE, bf16=True, clip_grad=0.2, paci={"clip": "stage"}),
    predicting("every", THREE, recompute="full", bf16=True, paci={"prediction_reach": 1.5}),
    predicting("every", THREE, accumulation=3, clip_grad=0.2, paci={"drain_interval": 2}, evaluate_after=(1, 3)),
    # Tied copies apply their gradients' sum later than the part that is there: they go only by their momentum.
    predicting("every", THREE, tied=True, clip_grad=0.2),
    predicting("window", THREE, tied=True, accumulation=4, bf16=True, distributed_optimizer=True, clip_grad=0.2),
]
TWO_BY_TWO = GptJob(stages=2, accumulation=3, calls=4, data_parallel=2)
REPLICATED = [
    predicting("every", TWO_BY_TWO, clip_grad=0.1),
    predicting("window", TWO_BY_TWO, bf16=True, overlap_grad_reduce=True),
    predicting("every", TWO_BY_TWO, distributed_optimizer=True, bf16=True, tied=True, paci={"prediction_reach": 0.5}),
    predicting("window", TWO_BY_TWO, distributed_optimizer=True, overlap_grad_reduce=True, align_grad_reduce=True),
]


def assert_as_steps_on_copies(jobs):
    for job, ranks in zip(jobs, assert_as_reference(jobs), strict=True):
        for rank, trained in enumerate(ranks):
            stage = rank // job.data_parallel
            spec = PipelineSpec(stages=job.stages, accumulation=job.accumulation)
            assert trained.stats["predictions"] == asked(job, spec, stage)


def asked(job, spec, stage):
    """How many predictions a stage has to make, until its last call returns."""
    interval = {"every": 1, "window": 1 << 30}.get(job.paci["prediction"], job.paci["prediction"])
    calls = job.paci.get("drain_interval")
    count = (calls or job.calls) * spec.accumulation
    between = {}  # updates done before the forward -> stale forwards
    for micro_batch in range(count if calls else count + spec.look_ahead(stage)):
        if drift_of(spec, stage, micro_batch):
            done = max(0, micro_batch - spec.look_ahead(stage)) // spec.accumulation
            between[done] = between.get(done, 0) + 1
    return sum(-(-stale // interval) for stale in between.values()) * (job.calls // calls if calls else 1)


@EXACT
def test_stages_predict_as_steps_on_copies():
    assert_as_steps_on_copies(STAGES)


@EXACT
def test_replicas_predict_each_from_its_own_part():
    assert_as_steps_on_copies(REPLICATED)


# Megatron's own schedule, and a chain, take norms otherwise than the reference: only the weights are compared.
OTHERS = {
    "switching": predicting("window", GptJob(calls=6, schedules=SWITCHED), paci={"drain_interval": 2}),
    "chained": predicting("every", GptJob(calls=4, accumulation=1, optimizer="matrices", lr=0.02)),
}


@pytest.fixture(scope="module")
def others():
    """name -> for each stage, what it gave and what the reference gives."""
    jobs = list(OTHERS.values())
    [expected] = run_ranks(reference.train_all, 1, (jobs,))
    found = zip(*run_ranks(train_all, 2, (jobs,)), strict=True)
    return dict(zip(OTHERS, (list(zip(*pair, strict=True)) for pair in zip(found, expected, strict=True)), strict=True))


@STOCK
@EXACT
def test_a_run_that_switches_to_the_stock_schedule_and_back_predicts_under_paci_alone(others):
    for stage, (trained, expected) in enumerate(others["switching"]):
        assert_equal(trained.weights, expected.weights, f"stage {stage}, weight")
        assert trained.stats["predictions"] == (2 if stage == 0 else 0)
        assert all(trained.kept)


@STOCK
@EXACT
def test_flushed_updates_at_the_start_predict_nothing():
    job = predicting("every", GptJob(calls=5, clip_grad=0.2), paci={"flush_warmup_steps": 2})
    [(first, last)] = assert_as_reference([job])
    assert (first.stats["predictions"], last.stats["predictions"]) == (3, 0)


@EXACT
def test_optimizers_in_a_chain_predict_each_its_parameters(others):
    for stage, (trained, expected) in enumerate(others["chained"]):
        assert_equal(trained.weights, expected.weights, f"stage {stage}, weight")
        assert trained.stats["predictions"] == (4 if stage == 0 else 0)


def test_a_resumed_run_predicts_with_the_clip_factor_of_the_last_update():
    plain = predicting("every", GptJob(calls=6, clip_grad=0.2), paci={"drain_interval": 3})
    jobs = [dataclasses.replace(plain, **change) for change in ({"bf16": True}, {"tied": True})]
    again = [dataclasses.replace(job, resume_after=3) for job in jobs]
    for trained in run_ranks(train_all, 2, ([*jobs, *again],)):
        for straight, resumed in zip(trained[:2], trained[2:], strict=True):
            assert_equal(resumed.weights, straight.weights, "weight")
            assert resumed.norms == straight.norms


# ---- tensor and sequence parallelism ---------------------------------------------------------------------------------

SLICED = [
    GptJob(stages=2, accumulation=2, calls=4, tensor_parallel=2, optimizer="sgd", lr=0.05, clip_grad=1.0, **change)
    for change in ({"paci": {"prediction": "every"}}, {"paci": {"prediction": "window"}, "sequence_parallel": True})
]


def whole(slices):
    """name -> weight of the layers that two ranks hold in slices."""
    joined = {}
    for name, one, other in ((name, value, slices[1][name]) for name, value in slices[0].items()):
        if torch.equal(one, other):
            joined[name] = one
        else:
            across = ("linear_proj.weight", "linear_fc2.weight")
            joined[name] = torch.cat([one, other], 1 if name.endswith(across) else 0)
    return joined


def test_sliced_layers_predict_as_whole_ones():
    """In fp32, to rounding; without a prediction, or with one from only a slice's part, they are far from that."""
    one_slice = [dataclasses.replace(job, tensor_parallel=1, slices=2, sequence_parallel=False) for job in SLICED]
    expected = run_ranks(train_all, 2, ([*one_slice, dataclasses.replace(one_slice[0], paci={})],))
    ranks = run_ranks(train_all, 4, (SLICED,))
    for number in range(len(SLICED)):
        for stage in range(2):
            found = whole([ranks[2 * stage + rank][number].weights for rank in range(2)])
            for name, weight in expected[stage][number].weights.items():
                torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=f"{name}, stage {stage}")
    predicted, unpredicted = (expected[0][number].weights for number in (0, 2))
    assert max((weight - unpredicted[name]).abs().max() for name, weight in predicted.items()) > 1e-3


# ---- what is communicated, and what is refused -----------------------------------------------------------------------


def record_all(jobs):
    return [train_recorded(job).collectives for job in jobs]


def test_a_prediction_speaks_to_the_replicas_of_its_stage_alone_and_only_where_they_hold_shards():
    """They gather its shards, and later the real ones; every call of the first stage has one stale forward."""
    whole = GptJob(data_parallel=2, calls=3, clip_grad=1.0)
    sharded = dataclasses.replace(whole, distributed_optimizer=True)
    jobs = [whole, predicting("every", whole), sharded, predicting("every", sharded)]
    for rank, collectives in enumerate(run_ranks(record_all, 4, (jobs,))):
        stage = (0, 1) if rank < 2 else (2, 3)
        assert {ranks for each in collectives for _, ranks in each} <= {stage, (rank,)}
        whole, predicted_whole, sharded, predicted_sharded = map(len, collectives)
        assert predicted_whole == whole
        assert predicted_sharded - sharded == (2 if rank < 2 else 0)


def _precision(optimizer):
    optimizer.config.use_precision_aware_optimizer = True


def _scaled(optimizer):
    optimizer.chained_optimizers[0].grad_scaler = object()


def _unknown(optimizer):
    wrapped = optimizer.chained_optimizers[0]
    wrapped.optimizer = torch.optim.Adagrad(wrapped.optimizer.param_groups)


REFUSED = {
    "--use-precision-aware-optimizer": (_precision, {"bf16": True}),
    "--loss-scale": (_scaled, {"bf16": True}),
    "optimizer Adagrad": (_unknown, {}),
    "LayerWiseDistributedOptimizer": (None, {"optimizer": "matrices", "layer_wise": True}),
    "config.grad_scale_func = optimizer.scale_loss": (None, {"changes": {"grad_scale_func": None}}),
}


def refusals_of(names):
    """What each of these jobs is refused with."""
    said = []
    for name in names:
        spoil, change = REFUSED[name]

        def spoiled(job, spoil=spoil):
            model, optimizer = wired(job)
            if spoil is not None:
                spoil(optimizer)
            return model, optimizer

        said += refusals([predicting("every", GptJob(calls=1), **change)], spoiled)
    return said


def test_what_cannot_be_predicted_is_refused_by_name_on_every_rank():
    first, last = run_ranks(refusals_of, 2, (list(REFUSED),))
    for name, said, echoed in zip(REFUSED, first, last, strict=True):
        assert said == echoed
        assert said.startswith("UnsupportedError")
        assert name in said
        assert "'prediction': 'every'} (--paci-prediction)" in said

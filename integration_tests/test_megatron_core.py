"""PACI on the real megatron-core: weights, losses and drift equal to a single process, to the last bit."""

import dataclasses
import gc

import pytest
import torch

from integration_tests.megatron_checks import EXACT, STOCK, assert_as_reference, assert_equal, world
from paci_schedule.adapters.frameworks import exists
from testing.megatron_job import refusals, train_all, train_recorded
from testing.megatron_model import GptJob
from testing.ranks import run_ranks

if not exists("megatron.core"):  # without an import, for which the CPU may have to play CUDA
    pytest.skip("megatron-core is not installed", allow_module_level=True)


@EXACT
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_megatron_trains_as_the_reference(stages):
    assert_as_reference([GptJob(stages=stages, accumulation=accumulation) for accumulation in (1, 2, 3, 4)])


@EXACT
def test_every_way_to_compute_a_stage_trains_as_the_reference():
    plain = GptJob(stages=2, accumulation=3, calls=4)
    assert_as_reference(
        [
            dataclasses.replace(plain, **change)
            for change in (
                {"bf16": True},
                {"bf16": True, "distributed_optimizer": True},
                {"distributed_optimizer": True},
                {"recompute": "full"},
                {"recompute": "selective", "bf16": True},
                {"deallocate": False},
                {"clip_grad": 0.1},
                {"clip_grad": 0.1, "bf16": True, "paci": {"drain_interval": 2}},
                {"clip_grad": 0.1, "paci": {"clip": "stage"}},
                {"tied": True},
                {"optimizer": "sgd"},
                {"evaluate_after": (1, 3)},
                {"paci": {"early_receives": True}, "tied": True},
                {"paci": {"drain_interval": 2}},
            )
        ]
    )


@EXACT
def test_sequences_whose_lengths_vary_train_as_the_reference():
    plain = GptJob(
        stages=3, accumulation=2, calls=4, lengths=(6, 3, 5), changes={"variable_seq_lengths": True}, clip_grad=0.2
    )
    tied = {"tied": True, "paci": {"early_receives": True, "drain_interval": 2}}
    assert_as_reference([plain, dataclasses.replace(plain, **tied)])


@EXACT
@pytest.mark.parametrize("stages", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_tied_embeddings_and_global_clipping_train_as_the_reference(stages):
    """The two copies are one weight, to the bit, though no stage waits for the other's gradient."""
    plain = GptJob(stages=stages, calls=6, tied=True, clip_grad=0.2)
    jobs = [
        *(dataclasses.replace(plain, accumulation=accumulation) for accumulation in (1, 2, 3, 4)),
        dataclasses.replace(plain, tied=False, accumulation=3),
        dataclasses.replace(plain, bf16=True, distributed_optimizer=True, accumulation=1),
        dataclasses.replace(plain, paci={"drain_interval": 3}),
        dataclasses.replace(plain, paci={"train_iters": 6}, clip_grad=0.0),
    ]
    for job, ranks in zip(jobs, assert_as_reference(jobs), strict=True):
        first, last = ranks[0].weights["embedding.word_embeddings.weight"], ranks[-1].weights["output_layer.weight"]
        assert torch.equal(first, last) == job.tied


@EXACT
@pytest.mark.parametrize("stages", [2, 4])
def test_a_stream_that_ends_before_the_pipe_is_full_trains_as_the_reference(stages):
    """No stage waits for a gradient that needs a forward it has yet to do."""
    plain = GptJob(stages=stages, accumulation=1, clip_grad=0.2)
    assert_as_reference(
        [
            dataclasses.replace(plain, calls=3, paci={"drain_interval": 1}),
            dataclasses.replace(plain, calls=stages - 1, paci={"train_iters": stages - 1}, tied=True),
        ]
    )


LATE_GATHER = {"overlap_grad_reduce": True, "distributed_optimizer": True, "overlap_param_gather": True}


@EXACT
def test_data_parallel_replicas_train_as_the_reference():
    plain = GptJob(stages=2, accumulation=3, calls=4, data_parallel=2)
    assert_as_reference(
        [
            dataclasses.replace(plain, **change)
            for change in (
                {"clip_grad": 0.1},
                {"clip_grad": 0.1, "tied": True},
                {"tied": True, "distributed_optimizer": True},
                {"distributed_optimizer": True, "bf16": True},
                {"overlap_grad_reduce": True},
                {"overlap_grad_reduce": True, "align_grad_reduce": True, "distributed_optimizer": True},
                {**LATE_GATHER, "paci": {"train_iters": 4}, "accumulation": 1, "tied": True, "clip_grad": 0.1},
                {**LATE_GATHER, "bf16": True, "evaluate_after": (2,), "paci": {"prediction": "every"}},
                {"per_token": True, "accumulation": 4, "tied": True, "clip_grad": 0.1},
                {"per_token": True, "accumulation": 2, **LATE_GATHER, "bf16": True},
            )
        ]
    )


@STOCK
@pytest.mark.parametrize(
    "job",
    [
        GptJob(stages=3, accumulation=2, calls=3, lr=0.0),
        GptJob(stages=2, accumulation=3, calls=3, lr=0.0, tensor_parallel=2),
        GptJob(stages=3, calls=4, accumulations=(2, 2, 3, 3), lr=0.0, paci={"drain_interval": 2}),
        GptJob(stages=3, calls=3, of_each_call=2, lr=0.0, paci={"drain_interval": 1}),
    ],
    ids=["pipeline", "tensor parallel", "another number of micro-batches", "an iterator for each call"],
)
def test_with_a_learning_rate_of_0_losses_and_gradients_are_the_stock_schedules(job):
    stock = dataclasses.replace(job, schedule="1f1b")
    for late, flushed in run_ranks(train_all, world(job), ([job, stock],)):
        assert late.losses == flushed.losses
        accumulations = job.accumulations or (job.accumulation,) * job.calls
        assert [len(losses) for losses in late.losses] in ([0] * job.calls, [*accumulations])
        for number in range(job.calls):
            assert any(gradient.abs().max() > 0 for gradient in late.gradients[number].values())
            assert_equal(late.gradients[number], flushed.gradients[number], f"call {number}, gradient of")


def test_tensor_parallel_ranks_of_a_stage_train_alike():
    plain = GptJob(stages=2, accumulation=2, calls=4, tensor_parallel=2, clip_grad=0.5)
    late = {"tied": True, "bf16": True}
    jobs = [
        plain,
        dataclasses.replace(plain, **late),
        dataclasses.replace(plain, **late, distributed_optimizer=True, evaluate_after=(2,)),
    ]
    for job, ranks in zip(jobs, zip(*run_ranks(train_all, world(plain), (jobs,)), strict=True), strict=True):
        for one, other in (ranks[:2], ranks[2:]):
            assert one.norms == other.norms
            assert one.losses == other.losses
            assert one.stats["max_drift"] == other.stats["max_drift"]
            for name in one.weights:
                if "norm" in name:
                    assert torch.equal(one.weights[name], other.weights[name])
        for first, last in zip(ranks[:2], ranks[2:], strict=True):
            same = torch.equal(first.weights["embedding.word_embeddings.weight"], last.weights["output_layer.weight"])
            assert same == job.tied


def test_counting_zero_gradients_counts_the_stages_own_and_leaves_the_norms_alone():
    plain = GptJob(clip_grad=0.2, tied=True)
    for silent, counted in run_ranks(train_all, 2, ([plain, dataclasses.replace(plain, count_zeros=True)],)):
        assert silent.zeros == [None] * plain.calls
        # The embedding of the last stage is shared: its zeros count only at the first stage.
        owned = [
            {name: gradient for name, gradient in call.items() if "output_layer" not in name}
            for call in counted.gradients
        ]
        assert counted.zeros == [sum(int((g == 0).sum()) for g in call.values()) for call in owned]
        assert counted.norms == silent.norms
        assert_equal(counted.weights, silent.weights, "weight")


def test_the_number_of_micro_batches_may_change_only_where_the_pipe_is_empty():
    """With tied embeddings, sums that a smaller number made wait are applied, by both copies alike."""
    tied = GptJob(
        stages=3, tied=True, clip_grad=0.2, calls=6, accumulations=(1, 1, 2, 2, 1, 1), paci={"drain_interval": 2}
    )
    first, _, last = [trained for [trained] in run_ranks(train_all, 3, ([tied],))]
    assert torch.equal(first.weights["embedding.word_embeddings.weight"], last.weights["output_layer.weight"])
    parked = dataclasses.replace(tied, tied=False, paci={"drain_interval": 3})
    [said], *_ = run_ranks(refusals, 3, ([parked],))
    assert "num_microbatches=2 after 1, with 1 micro-batches in flight" in said
    assert "drain_interval" in said


SWITCHED = ("paci", "paci", "1f1b", "1f1b", "paci", "paci")


@STOCK
@pytest.mark.parametrize(
    "change", [{}, {"data_parallel": 2, "distributed_optimizer": True}], ids=["pipeline", "sharded optimizer"]
)
def test_a_call_of_the_stock_schedule_between_drained_paci_calls_is_stock(change):
    """Gradients, norms and zeros, with a learning rate of 0; and PACI goes on with the norms of the stock calls."""
    job = GptJob(
        calls=6, lr=0.0, clip_grad=0.2, schedules=SWITCHED, count_zeros=True, paci={"drain_interval": 2}, **change
    )
    by_stage = dataclasses.replace(job, paci={**job.paci, "clip": "stage"})
    stock = dataclasses.replace(job, schedules=(), schedule="1f1b")
    ranks = run_ranks(train_all, world(job), ([job, by_stage, stock],))
    for *switched, stock in ranks:
        for trained in switched:
            assert trained.losses == stock.losses
            for call, schedule in enumerate(SWITCHED):
                if schedule == "1f1b":
                    assert trained.norms[call] == stock.norms[call]
                    assert trained.zeros[call] == stock.zeros[call]
                if not job.distributed_optimizer:  # whose buffers hold only a rank's own part
                    assert_equal(trained.gradients[call], stock.gradients[call], f"call {call}, gradient of")
    if not job.distributed_optimizer:
        squares = [
            [sum(float(gradient.square().sum()) for gradient in call.values()) for call in trained.gradients]
            for trained, *_ in ranks
        ]
        for stage, (trained, *_) in enumerate(ranks):
            assert trained.norms[4] == pytest.approx((squares[stage][4] + squares[1 - stage][3]) ** 0.5, rel=1e-5)


@STOCK
def test_tied_gradients_that_wait_are_applied_by_the_first_stock_call():
    job = GptJob(stages=3, accumulation=1, calls=6, lr=0.0, tied=True, schedules=SWITCHED, paci={"drain_interval": 2})
    first, _, last = run_ranks(train_all, 3, ([job, dataclasses.replace(job, schedules=(), schedule="1f1b")],))
    for (trained, stock), name in ((first, "embedding.word_embeddings.weight"), (last, "output_layer.weight")):
        got, should = ([call[f"module.{name}"] for call in each.gradients] for each in (trained, stock))
        assert [bool(gradient.any()) for gradient in got] == [False, False, True, True, False, False]
        assert torch.equal(got[3], should[3])
        torch.testing.assert_close(sum(got[:3]), sum(should[:3]))


def test_what_would_mix_up_parked_micro_batches_is_refused():
    """Another schedule, on every rank, also where the stage itself has none parked; and another data iterator."""
    switched = GptJob(stages=3, calls=2, schedules=("paci", "1f1b"))
    fed = GptJob(stages=3, calls=2, of_each_call=4)
    first, middle, last = run_ranks(refusals, 3, ([switched, fed],))
    assert first == middle == last
    assert "'1f1b' after 'paci', with 2 micro-batches in flight" in first[0]
    assert "another data_iterator than in the call before, with 2 micro-batches in flight" in first[1]
    assert all("{'drain_interval': n}" in said for said in first)


def models_left(jobs):
    """How many models are still there after each of several jobs in one process."""
    from megatron.core.models.gpt import GPTModel

    left = []
    for job in jobs:
        train_all([job])
        gc.collect()
        left.append(sum(isinstance(each, GPTModel) for each in gc.get_objects()))
    return left


@STOCK
def test_a_model_is_freed_when_its_training_is_over():
    """Once its pipe is empty: what is parked holds the graph, and the graph the model."""
    ended = GptJob(tied=True, clip_grad=1.0, paci={"train_iters": 5, "prediction": "every"})
    for left in run_ranks(models_left, 2, ([GptJob(schedule="1f1b"), ended, ended],)):
        assert left == [0, 0, 0]


@pytest.mark.parametrize("change", [{}, {"tied": True}, {"tied": True, "bf16": True}])
def test_a_resumed_run_goes_on_bit_for_bit(change):
    """With what is late by design: norms, and sums of tied gradients that wait to be applied; into a flush, too."""
    job = GptJob(stages=3, accumulation=1, calls=8, clip_grad=0.2, paci={"drain_interval": 4}, **change)
    flushed = dataclasses.replace(job, schedules=(*["paci"] * 4, *["1f1b"] * 2, *["paci"] * 2))
    jobs = [each for one in (job, flushed) for each in (one, dataclasses.replace(one, resume_after=4))]
    for straight, resumed, straight_flushed, resumed_flushed in run_ranks(train_all, 3, (jobs,)):
        for one, other in ((straight, resumed), (straight_flushed, resumed_flushed)):
            assert_equal(other.weights, one.weights, "weight")
            assert other.norms == one.norms


def test_a_state_saved_with_micro_batches_in_flight_is_refused():
    first, last = run_ranks(refusals, 2, ([GptJob(calls=3, resume_after=2)],))
    assert first == last
    assert "1 micro-batches in flight" in first[0]
    assert "drain_interval" in first[0]


def test_an_evaluation_changes_nothing_and_sees_the_weights_of_all_stages_at_one_version():
    plain = GptJob(stages=2, accumulation=2, calls=4)
    jobs = [
        plain,
        dataclasses.replace(plain, evaluate_after=(2, 3)),
        dataclasses.replace(plain, calls=2, paci={"train_iters": 2}, evaluate_after=(2,)),
    ]
    ranks = run_ranks(train_all, 2, (jobs,))
    for without, evaluated, _ in ranks:
        assert_equal(evaluated.weights, without.weights, "weight")
    _, evaluated, ended = ranks[-1]
    assert [len(losses) for losses in evaluated.evaluations] == [2, 2]
    assert evaluated.evaluations[0] == ended.evaluations[0]
    assert evaluated.evaluations[0] != evaluated.evaluations[1]


@STOCK
@pytest.mark.parametrize("change", [{}, {"distributed_optimizer": True}, {**LATE_GATHER, "per_token": True}])
def test_no_collective_of_a_steady_call_spans_stages(change):
    """Each is of one stage's replicas; the recorder does see those of the stock schedule that span stages."""
    job = GptJob(data_parallel=2, calls=3, clip_grad=1.0, **change)
    stages = [{0, 1}, {2, 3}]
    for stage, trained in zip([0, 0, 1, 1], run_ranks(train_recorded, 4, (job,)), strict=True):
        assert trained.collectives
        assert all(set(ranks) <= stages[stage] for _, ranks in trained.collectives), trained.collectives
    if not change:
        tied = run_ranks(train_recorded, 4, (dataclasses.replace(job, tied=True),))
        for trained, ends in zip(tied, [(0, 2), (1, 3), (0, 2), (1, 3)], strict=True):
            spanning = [ranks for _, ranks in trained.collectives if not any(set(ranks) <= stage for stage in stages)]
            assert spanning == [ends]  # of the embedding, which nobody waits for
        stock = run_ranks(train_recorded, 4, (dataclasses.replace(job, schedule="1f1b"),))
        assert all(
            ("allreduce", ranks) in trained.collectives
            for trained, ranks in zip(stock, [(0, 2), (1, 3), (0, 2), (1, 3)], strict=True)
        )

"""The optimizers that Megatron's --optimizer names, under PACI: equal to a single process, their sums of the stage."""

import dataclasses

import pytest

from integration_tests.megatron_job import GptJob, train_all, train_recorded
from integration_tests.megatron_optimizers import OF_ALL, OF_MAIN, is_main, missing
from integration_tests.ranks import on_gpus, run_ranks
from integration_tests.test_megatron_core import STOCK, assert_as_the_oracle_says, assert_equal

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

EXACT = pytest.mark.skipif(on_gpus(1), reason="equality to the last bit is asked for on the CPU")


def optimizer(name):
    """A parameter that is skipped where the package is missing that has the optimizer."""
    reason = missing(name, is_main())
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


NAMES = [optimizer(name) for name in ("matrices", *OF_ALL, *OF_MAIN)]


def layer_wise(optimizer, **job):
    """A job whose replicas share the weights out; Megatron-LM's main does so for emerging optimizers in bf16 alone."""
    return GptJob(optimizer=optimizer, layer_wise=True, bf16=optimizer != "matrices" and is_main(), **job)


@EXACT
@pytest.mark.parametrize("name", NAMES)
def test_weights_losses_norms_and_drift_are_the_oracles(name):
    plain = GptJob(stages=2, accumulation=3, calls=4, optimizer=name)
    assert_as_the_oracle_says([
        dataclasses.replace(plain, **change)
        for change in ({}, {"clip_grad": 0.1}, {"bf16": True, "clip_grad": 0.1, "tied": True}, {"accumulation": 1})
    ])


@EXACT
@pytest.mark.parametrize("name", NAMES)
def test_so_they_are_with_replicas_that_share_the_weights_out(name):
    """The layer-wise optimizer: each replica updates some weights whole, and they are gathered."""
    plain = layer_wise(name, stages=2, accumulation=2, calls=4)
    assert_as_the_oracle_says([plain, dataclasses.replace(plain, clip_grad=0.1, tied=True)])
    shared = dataclasses.replace(plain, data_parallel=2)
    jobs = [shared, dataclasses.replace(shared, tied=True)]
    if plain.bf16:  # matrices and all else in buffers of their own: Megatron-LM's main
        jobs.append(dataclasses.replace(shared, tied=True, distributed_optimizer=True))
    assert_as_the_oracle_says(jobs)


@STOCK
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shared", [False, True], ids=["whole", "layer-wise"])
def test_no_collective_of_a_steady_call_spans_stages(name, shared):
    make = layer_wise if shared else GptJob
    job = make(optimizer=name, data_parallel=2, calls=3, clip_grad=1.0, count_zeros=True)
    stages = [{0, 1}, {2, 3}]
    for stage, trained in zip([0, 0, 1, 1], run_ranks(train_recorded, 4, (job,)), strict=True):
        assert trained.collectives
        assert all(set(ranks) <= stages[stage] for _, ranks in trained.collectives), trained.collectives


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("shared", [False, True], ids=["whole", "layer-wise"])
def test_a_resumed_run_goes_on_bit_for_bit(name, shared):
    make = layer_wise if shared else GptJob
    job = make(optimizer=name, stages=2, data_parallel=1 + shared, calls=6, clip_grad=0.2, tied=True,
               paci={"drain_interval": 3})
    ranks = run_ranks(train_all, 2 * job.data_parallel, ([job, dataclasses.replace(job, resume_after=3)],))
    for straight, resumed in ranks:
        assert_equal(resumed.weights, straight.weights, "weight")
        assert resumed.norms == straight.norms


@pytest.mark.parametrize("name", NAMES[1:])
def test_tensor_parallel_ranks_agree(name):
    """Muon orthogonalises a weight that is split over them with collectives of their own."""
    job = GptJob(optimizer=name, calls=3, tensor_parallel=2, clip_grad=0.5, tied=True)
    ranks = run_ranks(train_recorded, 4, (job,))
    for one, other in (ranks[:2], ranks[2:]):
        assert one.norms == other.norms
        assert one.losses == other.losses
        for weight in one.weights:
            assert "norm" not in weight or (one.weights[weight] == other.weights[weight]).all()
    for rank, trained in enumerate(ranks):
        ends = (rank % 2, rank % 2 + 2)
        assert all(set(ranks) <= {rank - rank % 2, rank - rank % 2 + 1} or ranks == ends
                   for _, ranks in trained.collectives), trained.collectives

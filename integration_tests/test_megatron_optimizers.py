"""The optimizers that Megatron's --optimizer names, under PACI: equal to a single process, their sums of the stage."""

import dataclasses

import pytest
import torch

from integration_tests.megatron_checks import EXACT, STOCK, assert_as_reference, assert_equal
from paci_schedule import PaciError
from testing.megatron_job import prepare, train_all, train_recorded
from testing.megatron_model import GptJob, build, set_up
from testing.megatron_optimizers import OF_ALL, OF_MAIN, is_main, missing
from testing.ranks import run_ranks


def optimizer(name):
    """A parameter that is skipped where the package is missing that has the optimizer."""
    reason = missing(name, is_main())
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


NAMES = [optimizer(name) for name in ("matrices", *OF_ALL, *OF_MAIN)]


def layer_wise(optimizer, **job):
    """A job whose replicas share the weights out; Megatron-LM's main does so only for emerging optimizers in bf16."""
    return GptJob(optimizer=optimizer, layer_wise=True, bf16=optimizer != "matrices" and is_main(), **job)


@EXACT
@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_trains_as_the_reference(name):
    plain = GptJob(stages=2, accumulation=3, calls=4, optimizer=name)
    assert_as_reference(
        [
            dataclasses.replace(plain, **change)
            for change in ({}, {"clip_grad": 0.1}, {"bf16": True, "clip_grad": 0.1, "tied": True}, {"accumulation": 1})
        ]
    )


@EXACT
@pytest.mark.parametrize("name", NAMES)
def test_the_layer_wise_optimizer_trains_as_the_reference(name):
    """The layer-wise optimizer: each replica updates some weights whole, and they are gathered."""
    plain = layer_wise(name, stages=2, accumulation=2, calls=4)
    assert_as_reference([plain, dataclasses.replace(plain, clip_grad=0.1, tied=True)])
    shared = dataclasses.replace(plain, data_parallel=2)
    jobs = [shared, dataclasses.replace(shared, tied=True)]
    if plain.bf16:  # matrices and all else in buffers of their own: Megatron-LM's main
        jobs.append(dataclasses.replace(shared, tied=True, distributed_optimizer=True))
    assert_as_reference(jobs)


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
    job = make(
        optimizer=name,
        stages=2,
        data_parallel=1 + shared,
        calls=6,
        clip_grad=0.2,
        tied=True,
        paci={"drain_interval": 3},
    )
    ranks = run_ranks(train_all, 2 * job.data_parallel, ([job, dataclasses.replace(job, resume_after=3)],))
    for straight, resumed in ranks:
        assert_equal(resumed.weights, straight.weights, "weight")
        assert resumed.norms == straight.norms


@pytest.mark.parametrize("name", NAMES[1:])
def test_tensor_parallel_ranks_train_alike_with_each_optimizer(name):
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
        assert all(
            set(ranks) <= {rank - rank % 2, rank - rank % 2 + 1} or ranks == ends for _, ranks in trained.collectives
        ), trained.collectives


def predictions(jobs):
    """Of the optimizers of each job: whether predictions from the whole gradient are the steps, and whether a step with
    the gradient that the momentum expects leaves it as it is."""
    prepare()
    from paci_schedule.predict import advance, check, expected_gradient

    said = []
    for job in jobs:
        set_up(job)
        _, chain = build(job, 0, 1, 1)
        for optimizer in (part.optimizer for part in chain.chained_optimizers):
            check(optimizer)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            generator = torch.Generator().manual_seed(1)
            for _ in range(3):
                new = {p: torch.randn(p.shape, generator=generator) for p in parameters}
                predicted = {p: p.detach().clone() for p in parameters}
                advance(optimizer, predicted, {p: gradient.clone() for p, gradient in new.items()})
                step(optimizer, new)
                said.append(all(torch.equal(predicted[p], p) for p in parameters))
            groups = {p: group for group in optimizer.param_groups for p in group["params"]}
            expected, again = ({}, {})
            for found in (expected, again):
                for p, group in groups.items():
                    found[p] = expected_gradient(optimizer, group, p, p.detach())
                step(optimizer, found)
            said += [torch.allclose(expected[p], again[p], rtol=1e-3, atol=1e-5) for p in groups]
    return said


def step(optimizer, gradients):
    for parameter, gradient in gradients.items():
        parameter.grad = gradient.clone()
    optimizer.step()


@EXACT
@pytest.mark.parametrize("name", NAMES[1:])
def test_a_prediction_from_the_whole_gradient_is_the_step(name):
    """Query, key and value of a layer, which Muon orthogonalises each by itself, too."""
    [said] = run_ranks(predictions, 1, ([GptJob(optimizer=name, stages=1, lr=1e-3)],))
    assert len(said) > 10
    assert all(said), said


def refusals_of_optimizers():
    """What a job is refused with, by what its optimizer is or has."""
    prepare()
    from megatron.core.optimizer.optimizer import FP32Optimizer

    from paci_schedule.adapters.megatron.options import PaciOptions
    from paci_schedule.adapters.megatron.refusals import check_supported

    class Wrapper(FP32Optimizer):
        """Another one."""

    job = GptJob(stages=1)
    set_up(job)
    said = {}
    for name in ("grad_norm_skip_threshold", "Wrapper", "bare", ""):
        model, optimizer = build(job, 0, 1, 1)
        if name == "Wrapper":
            optimizer.chained_optimizers[0].__class__ = Wrapper
        elif name == "bare":
            optimizer.chained_optimizers.append(optimizer.chained_optimizers[0].optimizer)
        elif name:
            setattr(optimizer.config, name, 9)
        model.config.grad_scale_func = optimizer.scale_loss
        try:
            check_supported([model], model.config, PaciOptions(), None, {}, [0])
            said[name] = ""
        except PaciError as error:
            said[name] = str(error)
    return said


def test_what_cannot_run_is_refused_by_name():
    [said] = run_ranks(refusals_of_optimizers, 1)
    assert said.pop("") == ""
    assert "would skip an update that others apply; leave it at inf" in said["grad_norm_skip_threshold"]
    assert "Wrapper: not tried yet; use one that --optimizer names" in said["Wrapper"]
    assert "the optimizer AdamW in no wrapper of Megatron's" in said["bare"]

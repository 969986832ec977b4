"""Rehearsals on predicted weights: what a prediction is, who sees it, and that nothing waits for the device."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from paci_schedule import PipelineSpec
from paci_schedule.rehearse import REHEARSABLE, rehearse
from paci_schedule.rehearse import stage as stage_module
from tests.rehearsals import (  # noqa: F401
    PREDICTIONS,
    RATE,
    Scale,
    adamw,
    batches_of,
    loss_fn,
    network,
    one_thread,
    same,
    sgd,
    trained,
    values,
)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_prediction_changes_what_is_trained_and_every_is_one(prediction):
    off, every, found = (trained(prediction=each)[0] for each in ("off", "every", prediction))
    assert not same(found, off)
    assert same(found, every) is (prediction in ("every", 1))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("a", "extra"), [(4, 0), (2, 0), (1, 0), (2, 3)])
def test_the_stages_hold_real_weights_whenever_the_caller_looks(prediction, a, extra, monkeypatch):
    """The weights at every yield are those that the last step has left, and the run goes on as if nobody had looked."""
    modules, after_step = network(), {}
    optimizers = adamw(modules)
    for module, optimizer in zip(modules, optimizers, strict=True):
        after_step[module] = values([module])
        optimizer.register_step_post_hook(lambda *_, module=module: after_step.__setitem__(module, values([module])))
        optimizer.register_step_pre_hook(lambda *_, module=module: assert_same(values([module]), after_step[module]))
    for _ in rehearse(
        modules, optimizers, loss_fn, batches_of(5, a), accumulation=a, extra_in_flight=extra, prediction=prediction
    ):
        for module in modules:
            assert_same(values([module]), after_step[module])
    for module in modules:
        assert_same(values([module]), after_step[module])
    looked_at = values(modules)
    monkeypatch.setattr(stage_module.Stage, "show_real", lambda self: None)
    monkeypatch.setattr(stage_module.Stage, "go_on", lambda self: None)
    assert same(trained(a=a, count=5, extra_in_flight=extra, prediction=prediction)[0], looked_at)


def assert_same(one, other):
    assert same(one, other)


def test_a_caller_who_breaks_off_has_the_real_weights():
    modules, after_step = network(), {}
    optimizers = adamw(modules)
    for module, optimizer in zip(modules, optimizers, strict=True):
        optimizer.register_step_post_hook(lambda *_, module=module: after_step.__setitem__(module, values([module])))
    run = rehearse(modules, optimizers, loss_fn, batches_of(5, 4), accumulation=4, prediction="window")
    for update in run:
        if update.update == 3:
            break
    run.close()
    for module in modules:
        assert_same(values([module]), after_step[module])
        assert all(parameter.grad is None for parameter in module.parameters())


class Affine(nn.Module):
    """y = x + sum of the weight: its gradient does not depend on any weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.25], dtype=torch.float64))
        self.seen = []

    def forward(self, x):
        self.seen.append(self.weight.detach().clone())
        return x + (self.weight * torch.tensor([1.0, 3.0], dtype=torch.float64)).sum()


def trained_alike(modules, optimizers, a, count, **options):
    """Rehearse with the same input in every micro-batch."""
    one = torch.ones((), dtype=torch.float64)
    list(rehearse(modules, optimizers, lambda y, _: y, [[(one, None)] * a] * count, accumulation=a, **options))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [0.0, 0.7])
@pytest.mark.parametrize("stages", [2, 4])
def test_with_equal_gradients_a_prediction_is_the_true_next_weights(prediction, clip, stages):
    """The mean of any part is the whole: every forward runs on the weights that its window's step before will leave."""
    a, count = 4, 6
    modules = [Affine() for _ in range(stages)]
    versions, optimizers = [values([module]) for module in modules], []
    for module, own in zip(modules, versions, strict=True):
        optimizers.append(torch.optim.AdamW(module.parameters(), lr=0.1))
        optimizers[-1].register_step_post_hook(lambda *_, module=module, own=own: own.extend(values([module])))
    trained_alike(modules, optimizers, a, count, prediction=prediction, clip=clip)
    first = 3 * a if clip else 0  # the factors are alike when the first norms of all stages have come to all
    for module, own in zip(modules, versions, strict=True):
        assert len(own) == count + 1
        for number in range(first, a * count):
            torch.testing.assert_close(module.seen[number], own[number // a], rtol=1e-12, atol=1e-12)


class Square(Scale):
    """x times the weight's square: its backward reads the weight as it is by then."""

    def forward(self, x):
        return x * (self.weight * self.weight)


@pytest.mark.parametrize(
    ("prediction", "reach", "left_in_place"),
    [("every", 1.0, False), ("every", 1.5, False), (1, 0.5, False), ("window", 1.0, True), (2, 1, True)],
)
def test_backwards_run_on_a_prediction_only_where_it_is_left_in_place(prediction, reach, left_in_place):
    """P = a = 2.  Stage 0 runs F0, F1 B0, F2 B1 STEP: only F2 is stale, and B0 is its part of the gradient."""
    first, second, x = 1.5, -0.75, [0.25, 0.5, 1.0, 0.75]
    modules, stepped, put_out = [Square(first), Scale(second)], [], []
    optimizers = sgd(modules)
    optimizers[0].register_step_post_hook(lambda *_: stepped.append(modules[0].weight.item()))
    modules[0].register_forward_hook(lambda _module, _inputs, output: put_out.append(output.item()))
    pairs = [(torch.tensor(value, dtype=torch.float64), None) for value in x]
    list(
        rehearse(
            modules,
            optimizers,
            lambda y, _: y,
            [pairs[:2], pairs[2:]],
            accumulation=2,
            prediction=prediction,
            prediction_reach=reach,
        )
    )
    part = x[0] * second * 2 * first
    predicted = first - reach * RATE * part
    rest = x[1] * second * 2 * (predicted if left_in_place else first)
    real = first - RATE * (part + rest) / 2
    assert stepped[0] == pytest.approx(real, rel=1e-14)
    assert put_out == pytest.approx([x[0] * first**2, x[1] * first**2, x[2] * predicted**2, x[3] * real**2], rel=1e-14)


@pytest.mark.parametrize(("a", "stages", "extra"), [(1, 3, 0), (1, 4, 0), (2, 4, 0), (2, 3, 5)])
def test_a_prediction_goes_as_many_windows_ahead_as_the_micro_batch_is(a, stages, extra):
    """With equal gradients, micro-batch m runs on the weights of version m // a, from the second update on."""
    modules, count = [Affine() for _ in range(stages)], 12
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1, betas=(0.5, 0.75)) for module in modules]
    trained_alike(modules, optimizers, a, count, extra_in_flight=extra, prediction="every")
    spec = PipelineSpec(stages=stages, accumulation=a, extra_in_flight=extra)
    flushed = [Affine()]
    trained_alike(flushed, [torch.optim.AdamW(flushed[0].parameters(), lr=0.1, betas=(0.5, 0.75))], a, count)
    for stage, module in enumerate(modules):
        started = spec.look_ahead(stage) + a  # before the first update there is no momentum to go by
        for number in range(started, a * count):
            torch.testing.assert_close(module.seen[number], flushed[0].seen[number], rtol=1e-9, atol=1e-9)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prediction"), [*((name, "off") for name in REHEARSABLE), *(("paci", each) for each in PREDICTIONS)]
)
@pytest.mark.parametrize("a", [1, 4])
def test_nothing_waits_for_the_device_until_a_loss_is_read(name, prediction, a):
    """On fake tensors, which hold no numbers: a rehearsal never asks for one."""
    if name == "pipedream-2bw" and a == 1:
        a = 3
    with FakeTensorMode():
        modules = network()
        optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in modules]
        pairs = [(torch.randn(3, 6), torch.randn(3, 6)) for _ in range(a)]
        updates = list(
            rehearse(
                modules,
                optimizers,
                loss_fn,
                [pairs] * 4,
                schedule=name,
                accumulation=a,
                clip=0.5,
                prediction=prediction,
            )
        )
        with pytest.raises(DataDependentOutputException):
            _ = updates[0].loss

"""fp32 masters of low-precision weights: the optimizer's own step on them, which the weights are cast from."""

import pytest
import torch

from paci_schedule.errors import UnsupportedError
from paci_schedule.predict import advance, expected_gradient
from paci_schedule.rehearse import masters, rehearse, with_masters

if not hasattr(torch.Tensor, "grad_dtype"):
    pytest.skip("this torch sums the gradients of a bf16 weight in bf16", allow_module_level=True)

OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.3}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.03, "weight_decay": 0.2, "decoupled_weight_decay": True}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.7}),
    "Muon": (torch.optim.Muon, {"lr": 0.02}),
}


def parameters(dtype):
    torch.manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((4, 3), (3, 5), (2, 2))]


def give_gradients(params, step, of=slice(None)):
    generator = torch.Generator().manual_seed(step)
    for parameter in params[of]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masters_are_stepped_as_the_class_steps_weights(name, dtype):
    base, settings = OPTIMIZERS[name]
    low = parameters(dtype)
    high = [torch.nn.Parameter(parameter.detach().float()) for parameter in low]
    mixed, plain = with_masters(base)(low, **settings), base(high, **settings)
    for step in range(4):
        held = slice(1 if step == 2 else 0, None)  # one parameter has no gradient for once
        for params, optimizer in ((low, mixed), (high, plain)):
            give_gradients(params, step, held)
            optimizer.step()
            optimizer.zero_grad()
        for weight, master in zip(low, high, strict=True):
            assert torch.equal(weight, master.to(dtype))
    if dtype is torch.bfloat16:
        assert any((weight.float() != master).any() for weight, master in zip(low, high, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_prediction_from_the_whole_gradient_is_the_step(name):
    base, settings = OPTIMIZERS[name]
    low = parameters(torch.bfloat16)
    optimizer = with_masters(base)(low, **settings)
    for step in range(3):
        give_gradients(low, step)
        predicted = {parameter: parameter.detach().clone() for parameter in low}
        advance(optimizer, predicted, {parameter: parameter.grad.clone() for parameter in low})
        optimizer.step()
        assert all(torch.equal(predicted[parameter], parameter) for parameter in low)
    for parameter in low:
        assert expected_gradient(optimizer, optimizer.param_groups[0], parameter, parameter).shape == parameter.shape


def test_weights_in_fp32_beside_others_keep_their_gradients():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = with_masters(torch.optim.AdamW)([weight])
    give_gradients([weight], 0)
    optimizer.step()
    assert weight.grad is not None
    assert torch.equal(weight, optimizer.state[weight]["master"])


def test_gradients_are_summed_in_fp32():
    (weight,) = parameters(torch.bfloat16)[:1]
    with_masters(torch.optim.AdamW)([weight])
    for scale in (1.0, 2.0**-9, 2.0**-9):  # bf16 has 8 bits: it would lose the small ones
        (weight * scale).sum().backward()
    assert weight.grad.dtype is torch.float32
    assert (weight.grad == 1 + 2.0**-8).all()


@pytest.mark.parametrize("prediction", ["off", "every", "window"])
def test_stages_in_bf16_are_rehearsed(prediction):
    torch.manual_seed(0)
    stages = [torch.nn.Linear(4, 4, dtype=torch.bfloat16) for _ in range(3)]
    optimizers = [with_masters(torch.optim.AdamW)(stage.parameters(), lr=0.02) for stage in stages]
    inputs, labels = torch.randn(24, 2, 4).bfloat16(), torch.randn(24, 2, 4).bfloat16()
    batches = [[(inputs[at], labels[at]) for at in range(first, first + 3)] for first in range(0, 24, 3)]
    losses = [
        update.loss
        for update in rehearse(
            stages, optimizers, torch.nn.functional.mse_loss, batches, accumulation=3, prediction=prediction, clip=0.5
        )
    ]
    assert len(losses) == 8
    for stage, optimizer in zip(stages, optimizers, strict=True):
        for parameter in stage.parameters():
            assert torch.equal(parameter, optimizer.state[parameter]["master"].bfloat16())


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(masters, "_SUMS_IN_FP32", False)
    with pytest.raises(UnsupportedError, match=r"torch .* sums .*bf16.*take torch 2\.10 or later, or fp32"):
        with_masters(torch.optim.AdamW)

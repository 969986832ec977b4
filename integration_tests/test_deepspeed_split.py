"""A backward in two parts: the gradients of one backward, and a refusal of what it would get wrong."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from paci_schedule.adapters.deepspeed.split import SplitBackward
from paci_schedule.errors import UnsupportedError


class Twice(nn.Module):
    """A layer that uses its weight twice, and ends in a view."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, values):
        return self.linear(torch.tanh(self.linear(values))).view(-1, 3)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.linear, self._reentrant = nn.Linear(6, 6), use_reentrant

    def forward(self, values):
        return checkpoint(self.linear, values, use_reentrant=self._reentrant)


class Aside(nn.Module):
    """A layer with a second output that no input reaches."""

    def __init__(self):
        super().__init__()
        self.linear, self.lonely = nn.Linear(6, 6), nn.Parameter(torch.ones(2))

    def forward(self, values):
        return self.linear(values), 3.0 * self.lonely


class Plus(nn.Module):
    """A layer whose two parameters have one gradient, in one tensor."""

    def __init__(self):
        super().__init__()
        self.weight, self.change = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))

    def forward(self, values):
        return values @ (self.weight + self.change)


class Again(nn.Module):
    """A layer that repeats itself, with another weight between, as ALBERT does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, values):
        for _ in range(2):
            values = self.second(torch.tanh(self.first(values)))
        return values


class Beside(nn.Module):
    """A layer whose weight also makes an output that no input reaches."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, values):
        return values @ self.weight, 2 * self.weight


def split(module, passes=2):
    """The gradients of inputs and of weights, summed over several micro-batches whose W come after all their B."""
    backward = SplitBackward(SimpleNamespace(module=module, using_bf16_optimizer=False))
    inputs = []
    for number in range(passes):
        values = torch.arange(12.0).view(2, 6).div(7 + number).requires_grad_()
        outputs = module(values)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        backward.inputs(number, outputs, [torch.full_like(output, 0.5) for output in outputs], [values])
        assert all(weight.grad is None for weight in module.parameters())
        inputs.append(values.grad)
    for number in range(passes):
        backward.weights(number)
    return inputs, [weight.grad for weight in module.parameters()]


def whole(module, passes=2):
    """The same in one backward each."""
    inputs = []
    for number in range(passes):
        values = torch.arange(12.0).view(2, 6).div(7 + number).requires_grad_()
        outputs = module(values)
        outputs.backward(torch.full_like(outputs, 0.5))
        inputs.append(values.grad)
    return inputs, [weight.grad for weight in module.parameters()]


@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(6, 4), lambda: nn.LayerNorm(6), lambda: Checkpointed(use_reentrant=False)]
)
def test_two_parts_are_the_whole_to_the_bit(layer):
    torch.manual_seed(3)
    one = layer()
    found = split(one)
    one.zero_grad()
    for mine, theirs in zip(found, whole(one), strict=True):
        assert all(torch.equal(first, second) for first, second in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("layer", [Twice, Again, Plus])
def test_weights_that_a_stage_uses_twice_or_adds_up_are_summed_but_for_rounding(layer):
    torch.manual_seed(3)
    one = layer()
    found = split(one)
    one.zero_grad()
    for mine, theirs in zip(found, whole(one), strict=True):
        assert all(torch.allclose(first, second, rtol=1e-6) for first, second in zip(mine, theirs, strict=True))


def test_reentrant_checkpoints_of_a_layer_are_refused():
    with pytest.raises(UnsupportedError, match=r"reentrant autograd.*use_reentrant=False"):
        split(Checkpointed(use_reentrant=True))


def test_a_weight_that_the_split_would_lose_is_refused_by_name():
    for layer, name in ((Aside, "lonely"), (Beside, "weight")):
        with pytest.raises(UnsupportedError, match=rf"^{name}: the loss depends on these weights where"):
            split(layer())


def test_a_compiled_layer_whose_backward_frees_what_w_needs_is_refused_by_name():
    """Its backward was compiled under another schedule; where a B is its first backward, it frees nothing."""
    one = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), backend="aot_eager")
    backward = SplitBackward(SimpleNamespace(module=one, using_bf16_optimizer=False))
    values = torch.randn(2, 4).requires_grad_()
    one(values).pow(2).sum().backward()
    with pytest.raises(UnsupportedError, match=r"compiled layer .*engine.compile"):
        backward.inputs(0, [one(values).pow(2).sum()], None, [values])


def test_a_weight_that_is_unfrozen_later_is_trained():
    torch.manual_seed(3)
    one = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    one[0].weight.requires_grad_(False)
    backward = SplitBackward(SimpleNamespace(module=one, using_bf16_optimizer=False))
    for number in range(2):
        values = torch.ones(2, 6).requires_grad_()
        output = one(values)
        backward.inputs(number, [output], [torch.ones_like(output)], [values])
        backward.weights(number)
        one[0].weight.requires_grad_(True)
    assert one[0].weight.grad.abs().sum() > 0

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


def test_a_weight_that_a_stage_uses_twice_is_summed_but_for_rounding():
    torch.manual_seed(3)
    one = Twice()
    found = split(one)
    one.zero_grad()
    for mine, theirs in zip(found, whole(one), strict=True):
        assert all(torch.allclose(first, second, rtol=1e-6) for first, second in zip(mine, theirs, strict=True))


def test_reentrant_checkpoints_of_a_layer_are_refused():
    with pytest.raises(UnsupportedError, match=r"reentrant autograd.*use_reentrant=False"):
        split(Checkpointed(use_reentrant=True))


def test_a_weight_that_the_split_would_lose_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"^lonely: the loss depends on these weights where"):
        split(Aside())

"""The costs of layers: seconds on a clock that the layers move themselves, and bytes that can be counted by hand."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from paci_schedule import ConfigError
from paci_schedule.measure import profile
from paci_schedule.measure.profile import profile_layers

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `Taking` moves."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, clock, forward, backward):
        ctx.clock, ctx.seconds = clock, backward
        clock.seconds += forward
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.seconds += ctx.seconds.pop(0) if isinstance(ctx.seconds, list) else ctx.seconds
        return gradient, None, None, None


class Taking(nn.Module):
    """A layer that takes the given seconds; a list of backwards gives one time after the other."""

    def __init__(self, clock, forward, backward):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.costs = clock, forward, backward

    def forward(self, values):
        return _Take.apply(values * self.weight, *self.costs)


def test_seconds_are_the_layers_own(clock):
    costs = profile_layers([Taking(clock, 2, 3), Taking(clock, 7, 11), Taking(clock, 13, 5)], torch.ones(4, 3), CPU)
    assert [(cost.forward, cost.backward) for cost in costs] == [(2, 3), (7, 11), (13, 5)]


def test_seconds_are_the_least_without_the_first_runs(clock):
    layer = Taking(clock, 2, [1, 1, 9, 3, 4])
    assert [cost.backward for cost in profile_layers([layer], torch.ones(4, 3), CPU, repeats=3)] == [3]
    assert layer.costs[-1] == []


def test_bytes_that_a_layer_saves_besides_input_and_output():
    """Batch 5, widths 3 -> 7, fp32: a linear saves its input, a tanh its output, a product both factors."""
    layers = [nn.Linear(3, 7), nn.Tanh(), lambda values: values * (values + 1), nn.Flatten(0)]
    linear, tanh, product, flat = profile_layers(layers, torch.ones(5, 3), CPU)
    assert (linear.input_bytes, linear.saved_bytes, linear.output_bytes) == (60, 0, 140)
    assert linear.parameters == 21 + 7
    assert (tanh.input_bytes, tanh.saved_bytes, tanh.output_bytes, tanh.parameters) == (140, 0, 140, 0)
    assert (product.input_bytes, product.saved_bytes, product.output_bytes) == (140, 140, 140)
    assert (flat.saved_bytes, flat.frozen_bytes) == (0, 0)


def test_workspace_is_what_a_run_takes_beyond_what_it_keeps():
    """Batch 4, width 5, fp32: 80 bytes a tensor; a linear has 100 bytes of weight and 20 of bias."""

    def detour(values):
        return values.detach().mul(2).mul(3).sum() + values.exp()

    (cost,) = profile_layers([detour], torch.ones(4, 5), CPU)
    assert (cost.saved_bytes, cost.workspace_bytes) == (0, 4 + 80)  # the sum and exp's result besides the output
    _, cost = profile_layers([nn.Linear(5, 5), nn.Linear(5, 5)], torch.ones(4, 5), CPU)
    assert cost.saved_bytes == 0
    assert cost.workspace_bytes == 80 + 100 + 20  # gradients of the input, and of the parameters until they are added


def test_storages_count_once_and_whole_however_they_are_viewed():
    def views(values):
        wide = values + 1.0
        return (wide[:2] * wide[2:]).sum() * wide.T.square().sum()

    assert profile_layers([views], torch.ones(4, 3), CPU)[0].saved_bytes == 0  # nothing asks for a gradient
    (_, cost) = profile_layers([nn.Linear(3, 3), views], torch.ones(4, 3), CPU)
    assert cost.saved_bytes == 48 + 2 * 4  # `wide` and two scalars


def test_frozen_parameters_and_buffers_have_their_own_size_and_no_states():
    layer = nn.BatchNorm1d(3)  # weight, bias; mean and variance fp32, a counter int64
    layer.bias.requires_grad_(False)
    (cost,) = profile_layers([layer], torch.randn(5, 3), CPU)
    assert (cost.parameters, cost.frozen_bytes) == (3, 4 * 3 + (12 + 12 + 8))


def test_a_layer_that_recomputes_itself_is_measured_as_it_is(clock):
    class Recomputed(Taking):
        def forward(self, values):
            again = super().forward
            return checkpoint(lambda inner: again(inner).exp().sin(), values, use_reentrant=True)

    first = nn.Linear(3, 3)
    plain = nn.Sequential(Taking(clock, 2, 3), torch.nn.Tanhshrink())
    _, cost = profile_layers([first, Recomputed(clock, 2, 3)], torch.ones(4, 3), CPU)
    assert (cost.forward, cost.backward, cost.saved_bytes) == (2, 5, 0)
    _, cost = profile_layers([first, plain], torch.ones(4, 3), CPU)
    assert (cost.forward, cost.backward) == (2, 3)
    assert cost.saved_bytes > 0


def test_tuples_of_tensors_and_tensors_without_gradient_pass_through():
    def pair(inputs):
        values, ids = inputs
        assert values.requires_grad
        return values * 2.0, ids

    embed = nn.Embedding(9, 4)
    costs = profile_layers(
        [lambda ids: (embed(ids), ids), pair, lambda inputs: inputs[0].sum()], torch.tensor([[1, 2, 3]]), CPU
    )
    assert [cost.input_bytes for cost in costs] == [24, 48 + 24, 48 + 24]
    assert [cost.output_bytes for cost in costs] == [72, 72, 4]
    (cost,) = profile_layers([lambda inputs: inputs[0] + inputs[1]], [torch.ones(2), torch.ones(2)], CPU)
    assert cost.input_bytes == 16


def test_a_layer_may_work_in_place_as_behind_another_one():
    costs = profile_layers([nn.Linear(3, 3), nn.ReLU(inplace=True)], torch.ones(4, 3), CPU)
    assert costs[1].saved_bytes == 0  # its result stands where its input stood


def test_the_inputs_of_the_first_layer_get_no_gradient_the_others_do():
    wanted = []

    def look(values):
        wanted.append(values.requires_grad)
        return values * 1.5

    profile_layers([look, look], torch.ones(4, 3), CPU, repeats=1)
    assert wanted == [False] * 4 + [True] * 4


def test_layers_are_measured_in_the_dtype_that_is_asked_for():
    layers = [nn.Embedding(9, 4), nn.Linear(4, 4)]
    costs = profile_layers(layers, torch.tensor([1, 2, 3]), CPU, dtype=torch.bfloat16)
    assert [cost.output_bytes for cost in costs] == [24, 24]
    assert costs[1].parameters == 20


def test_one_layer_at_a_time_and_the_random_state_stays():
    alive = []

    def made():
        for _ in range(4):
            assert not [one for one in alive if one() is not None]
            layer = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
            alive.append(weakref.ref(layer))
            yield layer
            del layer

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert len(profile_layers(made(), torch.ones(4, 3), CPU)) == 4
    assert torch.equal(torch.rand(3), expected)


def test_a_layer_that_fails_is_named_with_what_it_got():
    with pytest.raises(ConfigError, match=r"(?s)layer 1, Linear, fails on float32\[4, 3\]: RuntimeError: .*the sample"):
        profile_layers([nn.Linear(3, 3), nn.Linear(5, 3)], torch.ones(4, 3), CPU)
    with pytest.raises(ConfigError, match=r"layer 0, half, fails on a tuple \(\w+\[2\], \w+\[1\]\)"):
        profile_layers([half], (torch.ones(2), torch.ones(1)), CPU)


def half(inputs):
    return inputs / 2


@pytest.mark.parametrize("sample", [None, "words", (torch.ones(2), 3)])
def test_a_sample_that_is_no_tensor_is_refused(sample):
    with pytest.raises(ConfigError, match="must be a tensor or a tuple of tensors, one micro-batch of inputs"):
        profile_layers([nn.Identity()], sample, CPU)


def test_no_repeats_are_refused():
    with pytest.raises(ConfigError, match="repeats=0: must be at least 1"):
        profile_layers([nn.Identity()], torch.ones(2), CPU, repeats=0)

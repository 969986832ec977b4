"""Predicted weights: with the whole window's gradient, those that the optimizer's own step leaves, bit for bit."""

import copy

import pytest
import torch

from paci_schedule.errors import UnsupportedError
from paci_schedule.predict import advance, check, expected_gradient, piece_of, pieces


class FusedAdam(torch.optim.Optimizer):
    """A FusedAdam with the attributes, groups and states of Apex's and Transformer Engine's, which run only on GPUs."""

    def __init__(
        self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True, bias_correction=True, **more
    ):
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction},
        )
        self.adam_w_mode = int(adam_w_mode)
        vars(self).update(more)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, gradient = self.state[p], p.grad.float()
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=torch.float32) for _ in "mv")
                if not self.adam_w_mode:
                    gradient = gradient + group["weight_decay"] * p
                state["exp_avg"].mul_(first).add_(gradient, alpha=1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
                corrected = [1 - beta ** group["step"] if group["bias_correction"] else 1 for beta in group["betas"]]
                update = state["exp_avg"] / corrected[0] / ((state["exp_avg_sq"] / corrected[1]).sqrt() + group["eps"])
                if self.adam_w_mode:
                    update = update + group["weight_decay"] * p
                p.sub_((group["lr"] * update).to(p.dtype))


FusedAdam.__module__ = "transformer_engine.pytorch.optimizers.fused_adam"

SHAPES = [(5, 3), (4,), (), (2, 7)]
MATRICES = [(5, 3), (2, 7), (6, 6)]

SETTINGS = {
    "Adam": (torch.optim.Adam, {"lr": 0.02, "betas": (0.7, 0.9)}),
    "Adam, decay in the gradient": (torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-3}),
    "Adam, amsgrad": (torch.optim.Adam, {"lr": 0.02, "amsgrad": True}),
    "Adam, maximize": (torch.optim.Adam, {"lr": 0.02, "maximize": True, "weight_decay": 0.1}),
    "Adam, fused": (torch.optim.Adam, {"lr": 0.02, "fused": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.3}),
    "AdamW, no decay": (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.0}),
    "AdamW, amsgrad": (torch.optim.AdamW, {"lr": 0.03, "amsgrad": True, "maximize": True}),
    "FusedAdam, fused": (FusedAdam, {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "FusedAdam, fused, decay in the gradient": (FusedAdam, {"lr": 0.02, "weight_decay": 0.1, "adam_w_mode": False}),
    "FusedAdam, fused, as it is": (FusedAdam, {"lr": 0.02, "bias_correction": False}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.02, "betas": (0.9, 0.99)}),
    "NAdam, decoupled decay": (torch.optim.NAdam, {"lr": 0.02, "weight_decay": 0.2, "decoupled_weight_decay": True}),
    "NAdam, decay in the gradient": (torch.optim.NAdam, {"lr": 0.02, "weight_decay": 0.2, "momentum_decay": 0.01}),
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD, momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.05}),
    "SGD, Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.7, "nesterov": True}),
    "SGD, maximize": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.6, "maximize": True}),
    "Muon": (torch.optim.Muon, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.2}),
    "Muon, plain": (torch.optim.Muon, {"lr": 0.02, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
}


def build(cls, settings, dtype=torch.float32, foreach=None):
    torch.manual_seed(3)
    shapes = MATRICES if cls is torch.optim.Muon else SHAPES
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.5 * settings["lr"]}]
    options = {} if foreach is None else {"foreach": foreach}
    return parameters, cls(groups, **settings, **options)


def gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    return {p: torch.randn(p.shape, generator=generator).to(p.dtype) for p in parameters}


def step(optimizer, new):
    for parameter, gradient in new.items():
        parameter.grad = gradient.clone()
    optimizer.step()


def copies(parameters):
    return {parameter: parameter.detach().clone() for parameter in parameters}


CASES = [
    (name, dtype, foreach)
    for name in SETTINGS
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    for foreach in (None, True, False)
    if foreach is None or not ("Muon" in name or "fused" in name)
]


@pytest.mark.parametrize(("name", "dtype", "foreach"), CASES)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_the_prediction_from_the_whole_gradient_is_the_step(name, dtype, foreach, steps):
    parameters, optimizer = build(*SETTINGS[name], dtype, foreach)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for number in range(steps):
        step(optimizer, gradients(parameters, number))
        schedule.step()
    predicted, before = copies(parameters), copies(parameters)
    kept = copy.deepcopy(optimizer.state_dict())
    advance(optimizer, predicted, gradients(parameters, steps))
    assert all(torch.equal(parameter, before[parameter]) for parameter in parameters)
    assert_same(optimizer.state_dict(), kept)
    step(optimizer, gradients(parameters, steps))
    assert all(torch.equal(predicted[parameter], parameter) for parameter in parameters)
    assert any(not torch.equal(before[parameter], parameter) for parameter in parameters)


def assert_same(state, kept):
    """True if all tensors of two state dicts are equal."""
    assert state["param_groups"] == kept["param_groups"]
    assert state["state"].keys() == kept["state"].keys()
    for key, values in state["state"].items():
        assert values.keys() == kept["state"][key].keys()
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(kept["state"][key][name]))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("foreach", [None, True])
def test_several_windows_are_as_many_steps_with_the_same_gradient(name, foreach):
    has_foreach = "Muon" not in name and "fused" not in name
    parameters, optimizer = build(*SETTINGS[name], foreach=foreach if has_foreach else None)
    step(optimizer, gradients(parameters, 0))
    predicted = copies(parameters)
    advance(optimizer, predicted, gradients(parameters, 1), 3)
    for _ in range(3):
        step(optimizer, gradients(parameters, 1))
    assert all(torch.equal(predicted[parameter], parameter) for parameter in parameters)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_reach_makes_a_step_as_many_times_as_long(name):
    parameters, optimizer = build(*SETTINGS[name], dtype=torch.float64)
    step(optimizer, gradients(parameters, 0))
    new = gradients(parameters, 1)
    once, far = copies(parameters), copies(parameters)
    advance(optimizer, once, {p: g.clone() for p, g in new.items()})
    advance(optimizer, far, {p: g.clone() for p, g in new.items()}, reach=1.5)
    for parameter in parameters:
        start = parameter.detach()
        torch.testing.assert_close(far[parameter] - start, 1.5 * (once[parameter] - start), rtol=1e-6, atol=1e-7)


def test_a_reach_needs_a_learning_rate_that_a_step_follows():
    class Fixed(torch.optim.Optimizer):
        def expected_gradient(self, group, state, weight):
            return None

    weight = [torch.nn.Parameter(torch.zeros(1))]
    check(Fixed(weight, {}))
    with pytest.raises(UnsupportedError, match=r"Fixed with prediction_reach=1\.5: .*\"lr\".*take a reach of 1"):
        check(Fixed(weight, {}), 1.5)
    apart = Fixed(weight, {"lr": 0.1})
    check(apart, 1.5)
    apart.weight_decay_method = "independent"
    with pytest.raises(UnsupportedError, match=r"independent weight decay .*a reach of 1"):
        check(apart, 1.5)


def test_a_step_finds_what_is_written_on_its_parameters():
    """Like Megatron's Muon, it asks a weight along which of its sides tensor-parallel ranks share it."""

    class Paced(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(parameter.pace)
            super().step()

    parameters, optimizer = build(Paced, {"lr": 0.1})
    for number, parameter in enumerate(parameters):
        parameter.pace = 1.0 + number
    predicted = copies(parameters)
    advance(optimizer, predicted, gradients(parameters, 0))
    step(optimizer, gradients(parameters, 0))
    assert all(torch.equal(predicted[parameter], parameter) for parameter in parameters)


def test_buckets_change_nothing(monkeypatch):
    parameters, optimizer = build(*SETTINGS["AdamW"])
    step(optimizer, gradients(parameters, 0))
    predicted = copies(parameters)
    monkeypatch.setattr("paci_schedule.predict.shadow._BUCKET", 16)
    advance(optimizer, predicted, gradients(parameters, 1))
    step(optimizer, gradients(parameters, 1))
    assert all(torch.equal(predicted[parameter], parameter) for parameter in parameters)


@pytest.mark.parametrize("name", [name for name in SETTINGS if "Muon" not in name])
def test_pieces_of_a_flat_parameter_are_predicted_as_the_whole(name):
    cls, settings = SETTINGS[name]
    torch.manual_seed(5)
    flat = torch.nn.Parameter(torch.randn(29))
    optimizer = cls([{"params": [flat], "lr": 0.7 * settings["lr"]}], **settings)
    (group,) = optimizer.param_groups
    for updates in range(3):
        new = gradients([flat], updates)
        whole, value = {flat: flat.detach().clone()}, flat.detach().clone()
        advance(optimizer, whole, {flat: new[flat].clone()}, 2)
        expected = expected_gradient(optimizer, group, flat, flat.detach())
        for cut in (slice(0, 12), slice(12, 24), slice(24, 36)):
            piece = piece_of(optimizer, group, flat, cut)
            (weight,) = piece.param_groups[0]["params"]
            found = expected_gradient(piece, piece.param_groups[0], weight, weight)
            assert found is None if expected is None else torch.equal(found, expected[cut])
            advance(piece, {weight: value[cut]}, {weight: new[flat][cut].clone()}, 2)
        assert torch.equal(value, whole[flat])
        step(optimizer, new)


def test_a_prediction_in_place_leaves_autograd_nothing_to_complain_of_and_runs_no_hook():
    parameters, optimizer = build(*SETTINGS["AdamW"])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    matrix = parameters[0]
    loss = (matrix @ torch.randn(3, 2, requires_grad=True)).square().sum()
    version = matrix._version
    before = matrix.detach().clone()
    advance(optimizer, {p: p for p in parameters}, gradients(parameters, 0))
    assert matrix._version == version
    assert not torch.equal(matrix, before)
    assert matrix.grad is None
    assert calls == []
    loss.backward()


def test_a_parameter_without_a_gradient_stays():
    parameters, optimizer = build(*SETTINGS["AdamW"])
    predicted, before = copies(parameters), copies(parameters)
    new = gradients(parameters, 0)
    del new[parameters[1]]
    advance(optimizer, predicted, new)
    moved = [not torch.equal(predicted[parameter], before[parameter]) for parameter in parameters]
    assert moved == [True, False, True, True]


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_momentum_expects_after_many_equal_gradients_is_that_gradient(name):
    cls, settings = SETTINGS[name]
    # Without a rate, so that a decay is of the same weights all the time, and for long, as SGD corrects no bias.
    parameters, optimizer = build(cls, {**settings, "lr": 0.0}, torch.float64)
    for _ in range(300):
        step(optimizer, gradients(parameters, 7))
    constant = gradients(parameters, 7)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = expected_gradient(optimizer, group, parameter, parameter.detach())
            if name == "SGD":
                assert found is None
            else:
                near = {"rtol": 1e-6, "atol": 1e-9} if cls is not FusedAdam else {"rtol": 1e-5, "atol": 1e-6}
                torch.testing.assert_close(found, constant[parameter], check_dtype=False, **near)


@pytest.mark.parametrize("name", [name for name in SETTINGS if "Adam" in name and "as it is" not in name])
def test_what_an_adam_expects_after_its_first_step_is_the_gradient_of_that_step(name):
    cls, settings = SETTINGS[name]
    parameters, optimizer = build(cls, {**settings, "lr": 0.0}, torch.float64)
    first = gradients(parameters, 7)
    step(optimizer, gradients(parameters, 7))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = expected_gradient(optimizer, group, parameter, parameter.detach())
            near = {"rtol": 1e-6, "atol": 1e-9} if cls is not FusedAdam else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(found, first[parameter], check_dtype=False, **near)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_momentum_expects_anything_before_the_first_step(name):
    parameters, optimizer = build(*SETTINGS[name])
    for group in optimizer.param_groups:
        assert all(expected_gradient(optimizer, group, p, p.detach()) is None for p in group["params"])
    assert all(not optimizer.state.get(parameter) for parameter in parameters)


def test_an_optimizer_that_is_not_known_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"optimizer Adagrad: .*Adam, AdamW.*momentum\.py"):
        check(torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))]))


class Counting(torch.optim.Optimizer):
    """Signs of a mean of gradients, by a rate that falls with the steps, which are counted for the last parameter."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            states = [self.state[parameter] for parameter in group["params"]]
            states[-1]["steps"] = states[-1].get("steps", 0) + 1
            for parameter, state in zip(group["params"], states, strict=True):
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 0.1)
                parameter.data.add_(mean.sign(), alpha=-group["lr"] / states[-1]["steps"])

    def expected_gradient(self, group, state, weight):
        return state["mean"].clone() if state else None

    def state_of(self, group, parameter):
        state = self.state.get(parameter, {})
        return {**state, "steps": self.state[group["params"][-1]]["steps"]} if state else state


def test_a_class_that_says_what_its_momentum_expects_is_predicted(monkeypatch):
    monkeypatch.setattr("paci_schedule.predict.shadow._BUCKET", 16)
    parameters, optimizer = build(Counting, {"lr": 0.1})
    check(optimizer)
    for number in range(4):
        predicted, momentum = copies(parameters), copies(parameters)
        advance(optimizer, predicted, gradients(parameters, number))
        expected = {
            p: expected_gradient(optimizer, group, p, p.detach())
            for group in optimizer.param_groups
            for p in group["params"]
        }
        before = copies(parameters)
        if number:
            advance(optimizer, momentum, expected)
        step(optimizer, gradients(parameters, number))
        assert all(torch.equal(predicted[parameter], parameter) for parameter in parameters)
        for parameter in parameters if number else ():
            kept = torch.sign(before[parameter] - momentum[parameter])
            assert torch.equal(kept, torch.sign(expected[parameter]))


@pytest.mark.parametrize(
    "how",
    [{"capturable": True}, {"master_weights": True}, {"use_master": True}, {"exp_avg_dtype": torch.bfloat16}],
    ids=lambda how: next(iter(how)),
)
def test_a_fused_adam_with_masters_or_states_of_another_kind_is_refused_by_name(how):
    check(FusedAdam([torch.nn.Parameter(torch.zeros(1))], 0.1))
    with pytest.raises(UnsupportedError, match=rf"optimizer FusedAdam with {next(iter(how))}: .*leave"):
        check(FusedAdam([torch.nn.Parameter(torch.zeros(1))], 0.1, **how))


@pytest.mark.parametrize("name", ["AdamW", "Muon", "SGD, Nesterov", "FusedAdam, fused"])
def test_all_pieces_together_are_predicted_as_the_whole(name, monkeypatch):
    """Only flat parameters are divided; of the others, at least one is predicted at a time."""
    cls, settings = SETTINGS[name]
    parameters, optimizer = build(cls, settings)
    flat = [torch.nn.Parameter(torch.randn(size)) for size in (17, 40)]
    if cls is not torch.optim.Muon:
        optimizer.add_param_group({"params": flat, "lr": 0.3 * settings["lr"]})
        parameters = [*parameters, *flat]
    monkeypatch.setattr("paci_schedule.predict.shadow.PIECE", 16)
    monkeypatch.setattr("paci_schedule.predict.shadow._BUCKET", 16)
    for updates in range(2):
        new = gradients(parameters, updates)
        whole, values = copies(parameters), copies(parameters)
        advance(optimizer, whole, {p: g.clone() for p, g in new.items()}, 2)
        seen = []
        for stepping, group, entries in pieces(optimizer):
            found = {known: known.detach().clone() for known, _, _ in entries}
            assert all(any(known is each for each in group["params"]) for known in found)
            assert sum(known.numel() for known in found) <= 16 or len(found) == 1
            advance(stepping, found, {known: new[of][cut].clone() for known, of, cut in entries}, 2)
            for known, of, cut in entries:
                values[of][cut] = found[known]
                seen.append(known.numel())
        assert sum(seen) == sum(parameter.numel() for parameter in parameters)
        assert all(torch.equal(values[parameter], whole[parameter]) for parameter in parameters)
        step(optimizer, new)


def test_a_subclass_takes_its_own_step():
    class Doubled(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            return super().step(closure)

    parameters, optimizer = build(Doubled, SETTINGS["AdamW"][1])
    check(optimizer)
    predicted = copies(parameters)
    advance(optimizer, predicted, gradients(parameters, 0))
    step(optimizer, gradients(parameters, 0))
    assert all(torch.equal(predicted[parameter], parameter) for parameter in parameters)

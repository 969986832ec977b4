"""Rehearsals against arithmetic done by hand and plain training; predictions; what is refused."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from paci_schedule import ConfigError, PipelineSpec, UnsupportedError
from paci_schedule.core.drift import drift_of
from paci_schedule.rehearse import REHEARSABLE, rehearse
from paci_schedule.rehearse import stage as stage_module
from paci_schedule.rehearse.stash import Stash

RATE = 0.125


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are tiny: threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Scale(nn.Module):
    """x times a weight: loss x w0 w1 ... has gradients that are products of the other stages' weights."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x):
        return x * self.weight


def by_hand(weights, inputs, a, reads):
    """Weights of all stages after every update, for the loss x * w0 * w1 * ...: SGD, stage by stage.

    Args:
        reads: (stage, micro-batch, "F" or "B") -> the version of its weight that the op reads; nothing else matters.
    """
    stages, updates = len(weights), len(inputs) // a
    history = [[weight] for weight in weights]

    def read(stage, micro, kind):
        return history[stage][reads(stage, micro, kind)]

    for update in range(updates):
        sums = [0.0] * stages
        for micro in range(update * a, (update + 1) * a):
            activation = [inputs[micro]]
            for stage in range(stages):
                activation.append(activation[-1] * read(stage, micro, "F"))
            gradient = 1.0 / a
            for stage in reversed(range(stages)):
                sums[stage] += gradient * activation[stage]
                gradient *= read(stage, micro, "B")
        for stage in range(stages):
            history[stage].append(history[stage][-1] - RATE * sums[stage])
    return [versions[-1] for versions in history]


def stash_reads(a, stages):
    def reads(stage, micro, kind):
        return max(0, micro - (stages - 1 - stage)) // a

    return reads


def paci_reads(a, stages):
    stash = stash_reads(a, stages)
    return lambda stage, micro, kind: stash(stage, micro, kind) if kind == "F" else micro // a


def two_versions_reads(a, stages):
    return lambda stage, micro, kind: max(0, micro // a - 1)


def flush_reads(a, stages):
    return lambda stage, micro, kind: micro // a


HANDS = {
    "flush": flush_reads,
    "paci": paci_reads,
    "paci-stash": stash_reads,
    "pipedream": stash_reads,
    "pipedream-2bw": two_versions_reads,
}


@pytest.mark.parametrize("name", REHEARSABLE)
@pytest.mark.parametrize(("stages", "a"), [(2, 1), (2, 3), (3, 2), (4, 3), (4, 5)])
def test_the_weights_are_those_of_arithmetic_by_hand(name, stages, a):
    weights, inputs = [1.5, -0.75, 2.0, 0.5][:stages], [0.25 * (1 + (3 * m) % 5) for m in range(5 * a)]
    modules = [Scale(weight) for weight in weights]
    batches = [[(torch.tensor(x, dtype=torch.float64), None) for x in inputs[at : at + a]] for at in range(0, 5 * a, a)]
    seen = list(rehearse(modules, sgd(modules), lambda y, _: y, batches, schedule=name, accumulation=a))
    window = 1 if name == "pipedream" else a
    expected = by_hand(weights, inputs, window, HANDS[name](window, stages))
    assert [module.weight.item() for module in modules] == pytest.approx(expected, rel=1e-13)
    assert [update.update for update in seen] == list(range(len(inputs) // window))
    if name != "flush":
        spec = PipelineSpec(stages=stages, accumulation=window)
        assert seen[-1].drift == [
            max(drift_of(spec, stage, m) for m in range(len(inputs) - spec.look_ahead(stage)))
            for stage in range(stages)
        ]
    else:
        assert seen[-1].drift == [0] * stages


def test_the_cases_by_hand_tell_the_schedules_apart():
    inputs = [0.25 * (1 + (3 * m) % 5) for m in range(15)]
    results = {
        tuple(
            by_hand(
                [1.5, -0.75, 2.0, 0.5],
                inputs,
                1 if name == "pipedream" else 3,
                reads(1 if name == "pipedream" else 3, 4),
            )
        )
        for name, reads in HANDS.items()
    }
    assert len(results) == len(HANDS)


def sgd(modules, **options):
    return [torch.optim.SGD(module.parameters(), lr=RATE, **options) for module in modules]


# ---- a small network ------------------------------------------------------------------------------------------------


def network(stages=4):
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()) for _ in range(stages)]


def adamw(modules):
    return [torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1) for module in modules]


def batches_of(count, a, same=False):
    generator = torch.Generator().manual_seed(9)
    pairs = [(torch.randn(3, 6, generator=generator), torch.randn(3, 6, generator=generator)) for _ in range(count * a)]
    return [[pairs[0] if same else pairs[at + number] for number in range(a)] for at in range(0, count * a, a)]


def loss_fn(output, labels):
    return nn.functional.mse_loss(output, labels)


def values(modules):
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def trained(make=adamw, count=6, a=4, stages=4, **options):
    modules = network(stages)
    losses = [
        each.loss for each in rehearse(modules, make(modules), loss_fn, batches_of(count, a), accumulation=a, **options)
    ]
    return values(modules), losses


def plain(count, a, clip=0.0):
    """The unsplit model, trained without any schedule."""
    modules = network()
    whole = nn.Sequential(*modules)
    (optimizer,), losses = adamw([whole]), []
    for batch in batches_of(count, a):
        losses.append(0.0)
        for inputs, labels in batch:
            loss = loss_fn(whole(inputs), labels)
            (loss / a).backward()
            losses[-1] += loss.item() / a
        if clip:
            nn.utils.clip_grad_norm_(whole.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return values([whole]), losses


@pytest.mark.parametrize("prediction", ["off", "every"])
def test_a_flush_is_plain_training_of_the_unsplit_model(prediction):
    found, losses = trained(schedule="flush", prediction=prediction)
    expected, expected_losses = plain(6, 4)
    assert same(found, expected)
    assert losses == pytest.approx(expected_losses, rel=1e-6)


def test_a_flush_clips_by_the_norm_of_the_unsplit_model():
    found, _ = trained(schedule="flush", clip=0.3)
    expected, _ = plain(6, 4, clip=0.3)
    assert not same(expected, plain(6, 4)[0])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["flush", "paci", "paci-stash", "pipedream-2bw"])
def test_one_stage_is_plain_training_but_for_the_schedule_that_is_always_late(name):
    modules = [nn.Sequential(*network())]
    list(rehearse(modules, adamw(modules), loss_fn, batches_of(5, 3), schedule=name, accumulation=3))
    assert same(values(modules), plain(5, 3)[0]) is (name != "pipedream-2bw")


@pytest.mark.parametrize("name", ["paci", "paci-stash", "pipedream"])
def test_clipping_by_a_norm_that_is_never_reached_changes_nothing(name):
    assert same(trained(schedule=name, clip=1e9)[0], trained(schedule=name)[0])
    assert not same(trained(schedule=name, clip=0.2)[0], trained(schedule=name)[0])


@pytest.mark.parametrize("name", REHEARSABLE)
def test_no_activation_is_kept_after_a_rehearsal_and_no_gradient(name):
    modules = network()
    seen = []
    modules[1].register_forward_hook(lambda module, inputs, output: seen.append(weakref.ref(output)))
    list(rehearse(modules, adamw(modules), loss_fn, batches_of(3, 4), schedule=name, accumulation=4))
    assert len(seen) == 12
    assert not any(reference() is not None for reference in seen)
    assert all(parameter.grad is None for module in modules for parameter in module.parameters())


@pytest.mark.parametrize("name", REHEARSABLE)
def test_parameters_stay_in_their_storage(name):
    modules = network()
    before = [parameter.data_ptr() for module in modules for parameter in module.parameters()]
    list(rehearse(modules, adamw(modules), loss_fn, batches_of(3, 4), schedule=name, accumulation=4))
    assert [parameter.data_ptr() for module in modules for parameter in module.parameters()] == before


@pytest.mark.parametrize(
    ("name", "a", "most"),
    [
        ("paci-stash", 1, [4, 3, 2, 1]),
        ("paci-stash", 2, [3, 2, 2, 1]),
        ("paci-stash", 4, [2, 2, 2, 1]),
        ("pipedream", 4, [4, 3, 2, 1]),
        ("pipedream-2bw", 4, [2, 2, 2, 2]),
    ],
)
def test_there_are_as_many_versions_as_the_schedule_holds(name, a, most, monkeypatch):
    made = []
    original = Stash.__init__
    monkeypatch.setattr(
        Stash, "__init__", lambda self, *args, **options: (original(self, *args, **options), made.append(self))[0]
    )
    trained(schedule=name, a=a)
    assert [stash.most for stash in made] == most


def test_several_optimizers_and_schedulers_of_a_stage():
    def both(modules):
        return [
            [torch.optim.Muon([m[0].weight], lr=0.01), torch.optim.AdamW([m[0].bias, *m[1].parameters()], lr=0.05)]
            for m in modules
        ]

    modules = network()
    optimizers = both(modules)
    schedulers = [[torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in several] for several in optimizers]
    before = values(modules)
    list(
        rehearse(
            modules, optimizers, loss_fn, batches_of(3, 4), accumulation=4, prediction="every", schedulers=schedulers
        )
    )
    assert all(not torch.equal(a, b) for a, b in zip(before, values(modules), strict=True))
    assert optimizers[0][0].param_groups[0]["lr"] == pytest.approx(0.01 / 8)
    assert optimizers[3][1].param_groups[0]["lr"] == pytest.approx(0.05 / 8)


def test_stages_that_train_nothing_and_tuples_between_stages():
    class Split(nn.Module):
        def forward(self, x):
            return x, torch.arange(len(x)), 2 * x

    class Join(nn.Module):
        def forward(self, parts):
            return parts[0] + parts[2] + parts[1][:, None]

    modules = [Split(), Join(), *network(1)]
    expected = [copy.deepcopy(modules[2])]
    list(rehearse(modules, [[], [], *adamw(modules[2:])], loss_fn, batches_of(3, 2), accumulation=2, clip=0.5))
    joined = [[(3 * x + torch.arange(3)[:, None], y) for x, y in batch] for batch in batches_of(3, 2)]
    list(rehearse(expected, adamw(expected), loss_fn, joined, accumulation=2, clip=0.5))
    assert same(values(modules), values(expected))


# ---- prediction -----------------------------------------------------------------------------------------------------

PREDICTIONS = ["window", "every", 1, 2, 3]


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
    one = torch.ones((), dtype=torch.float64)
    list(
        rehearse(
            modules,
            optimizers,
            lambda y, _: y,
            [[(one, None)] * a] * count,
            accumulation=a,
            prediction=prediction,
            clip=clip,
        )
    )
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
    one = torch.ones((), dtype=torch.float64)
    modules = [Affine() for _ in range(stages)]
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1, betas=(0.5, 0.75)) for module in modules]
    count = 12
    list(
        rehearse(
            modules,
            optimizers,
            lambda y, _: y,
            [[(one, None)] * a] * count,
            accumulation=a,
            extra_in_flight=extra,
            prediction="every",
        )
    )
    spec = PipelineSpec(stages=stages, accumulation=a, extra_in_flight=extra)
    flushed = [Affine()]
    list(
        rehearse(
            flushed,
            [torch.optim.AdamW(flushed[0].parameters(), lr=0.1, betas=(0.5, 0.75))],
            lambda y, _: y,
            [[(one, None)] * a] * count,
            accumulation=a,
        )
    )
    for stage, module in enumerate(modules):
        started = spec.look_ahead(stage) + a  # before the first update there is no momentum to go by
        for number in range(started, a * count):
            torch.testing.assert_close(module.seen[number], flushed[0].seen[number], rtol=1e-9, atol=1e-9)


# ---- what is refused ------------------------------------------------------------------------------------------------


def asked(**changes):
    modules = network()
    given = {
        "stages": modules,
        "optimizers": adamw(modules),
        "loss_fn": loss_fn,
        "batches": batches_of(2, 4),
        "accumulation": 4,
        **changes,
    }
    return rehearse(given.pop("stages"), given.pop("optimizers"), given.pop("loss_fn"), given.pop("batches"), **given)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"schedule": "pacl"}, ConfigError, r"schedule='pacl'.*did you mean 'paci'"),
        ({"prediction": "always"}, ConfigError, r"prediction='always'.*'window'"),
        ({"prediction": 0}, ConfigError, "prediction=0"),
        ({"prediction": "every", "prediction_reach": 0}, ConfigError, "prediction_reach=0: must be a number above 0"),
        ({"prediction": "every", "prediction_reach": 4.5}, ConfigError, "prediction_reach=4.5: must be .* at most 4"),
        ({"prediction": "every", "prediction_reach": "far"}, ConfigError, "prediction_reach='far': must be a number"),
        (
            {"prediction": "window", "prediction_reach": 1.5},
            ConfigError,
            "prediction_reach=1.5 with prediction='window'",
        ),
        (
            {"prediction_reach": 1.5},
            ConfigError,
            "prediction_reach=1.5: has no effect without.*take prediction='every'",
        ),
        ({"prediction": True}, ConfigError, "prediction=True"),
        ({"clip": -1.0}, ConfigError, r"clip=-1\.0"),
        ({"clip": float("nan")}, ConfigError, "clip=nan"),
        ({"accumulation": 0}, ConfigError, "accumulation=0"),
        ({"stages": []}, ConfigError, "stages=0"),
        ({"extra_in_flight": 2, "schedule": "flush"}, ConfigError, "extra_in_flight=2"),
        ({"accumulation": 2, "schedule": "pipedream-2bw"}, ConfigError, "pipedream-2bw"),
        ({"optimizers": []}, ConfigError, "optimizers has 0 entries for 4 stages"),
        ({"schedulers": [None]}, ConfigError, "schedulers has 1 entries for 4 stages"),
        ({"optimizers": [[], [], [], []]}, ConfigError, r"parameter 0\.weight of stage 0 is stepped by 0"),
        ({"prediction": "every", "schedule": "paci-stash"}, UnsupportedError, "prediction='every' with schedule"),
        ({"prediction": 2, "schedule": "pipedream"}, UnsupportedError, "prediction=2 with schedule"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(changes, error, words):
    with pytest.raises(error, match=words):
        asked(**changes)


def test_an_optimizer_that_cannot_be_predicted_is_refused_at_once():
    modules = network()
    optimizers = [torch.optim.Adagrad(module.parameters()) for module in modules]
    with pytest.raises(UnsupportedError, match="optimizer Adagrad"):
        asked(stages=modules, optimizers=optimizers, prediction="window")
    list(asked(stages=modules, optimizers=optimizers))


def test_an_optimizer_of_another_stage_is_refused():
    modules = network()
    with pytest.raises(ConfigError, match=r"optimizers\[0\] steps a parameter that stage 0 does not have"):
        asked(stages=modules, optimizers=adamw(modules)[::-1])


def test_two_optimizers_of_a_parameter_are_refused():
    modules = network()
    with pytest.raises(ConfigError, match="stepped by 2 of its optimizers"):
        asked(
            stages=modules, optimizers=[[one, other] for one, other in zip(adamw(modules), adamw(modules), strict=True)]
        )


def test_a_tied_weight_is_refused():
    modules = network()
    modules[3][0].weight = modules[0][0].weight
    with pytest.raises(UnsupportedError, match=r"0\.weight of stage 3 is a parameter of stage 0 too"):
        asked(stages=modules)


def test_a_short_batch_is_refused_when_it_comes():
    batches = batches_of(3, 4)
    batches[2].pop()
    run = asked(batches=batches)
    assert [next(run).update, next(run).update] == [0, 1]
    with pytest.raises(ConfigError, match="batch 2 has 3 micro-batches"):
        next(run)


def test_a_micro_batch_that_is_no_pair_is_refused():
    with pytest.raises(ConfigError, match="micro-batch 2 is a Tensor"):
        next(asked(batches=[[*batches_of(1, 4)[0][:2], torch.zeros(2), torch.zeros(2)]]))


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

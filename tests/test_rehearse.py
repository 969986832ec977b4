"""Rehearsals compared with arithmetic by hand, and with plain training."""

import copy
import weakref

import pytest
import torch
from torch import nn

from paci_schedule import PipelineSpec
from paci_schedule.core.drift import drift_of
from paci_schedule.rehearse import REHEARSABLE, rehearse
from paci_schedule.rehearse.stash import Stash
from tests.rehearsals import RATE, Scale, adamw, batches_of, loss_fn, network, one_thread, same, sgd, trained, values  # noqa: F401


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


# ---- a small network ------------------------------------------------------------------------------------------------


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

"""Rehearsals that are refused, each with one clear error."""

import pytest
import torch

from paci_schedule import ConfigError, UnsupportedError
from paci_schedule.rehearse import rehearse
from tests.rehearsals import adamw, batches_of, loss_fn, network, one_thread  # noqa: F401


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
        ({"flush_warmup_steps": -1}, ConfigError, "flush_warmup_steps=-1: must be a whole number"),
        ({"flush_warmup_steps": 0.1}, ConfigError, r"flush_warmup_steps=0\.1: must be a whole number"),
        ({"flush_warmup_steps": 2, "schedule": "flush"}, ConfigError, "flush_warmup_steps=2 with schedule='flush'"),
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
    with pytest.raises(UnsupportedError, match=r"0\.weight of stage 3 is also a parameter of stage 0"):
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

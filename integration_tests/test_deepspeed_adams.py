"""DeepSpeed's own Adams: a prediction is their next step, bit for bit, and changes nothing of what they do later.

Slow the first time: DeepSpeed compiles their kernels for the CPU.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any
from unittest import mock

import pytest
import torch

from integration_tests.test_deepspeed_prediction import MIXED, OFFLOAD, predicting
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.predict import advance, check, expected_gradient, piece_of
from testing import deepspeed_job, ranks
from testing.reference.deepspeed import run as reference_of
from tests.test_predict import assert_same, copies, gradients, step

pytestmark = pytest.mark.slow

SETTINGS = {
    "FusedAdam": ("FusedAdam", {"weight_decay": 0.2}),
    "FusedAdam, decay in the gradient": ("FusedAdam", {"weight_decay": 0.2, "adam_w_mode": False}),
    "FusedAdam, bias not corrected": ("FusedAdam", {"bias_correction": False}),
    "DeepSpeedCPUAdam": ("DeepSpeedCPUAdam", {"weight_decay": 0.2}),
    "DeepSpeedCPUAdam, decay in the gradient": ("DeepSpeedCPUAdam", {"weight_decay": 0.2, "adamw_mode": False}),
    "DeepSpeedCPUAdam, bias not corrected": ("DeepSpeedCPUAdam", {"bias_correction": False}),
}


def build(name, shapes, lr=0.02):
    """Parameters, an optimizer that DeepSpeed would step, and the same as predictions step it."""
    import deepspeed.ops.adam

    from paci_schedule.adapters.deepspeed.adam import stepped_as

    kind, settings = SETTINGS[name]
    torch.manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    groups = [{"params": parameters[:-1]}, {"params": parameters[-1:], "lr": 0.5 * lr}]
    optimizer = getattr(deepspeed.ops.adam, kind)([group for group in groups if group["params"]], lr=lr, **settings)
    return parameters, optimizer, stepped_as(optimizer)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_prediction_from_the_whole_gradient_is_the_step_and_disturbs_no_later_one(name, monkeypatch):
    monkeypatch.setattr("paci_schedule.predict.shadow._BUCKET", 24)
    shapes = [(5, 3), (4,), (), (2, 7), (3, 3)]
    parameters, optimizer, stepped = build(name, shapes)
    untold, other, _ = build(name, shapes)
    check(stepped)
    for updates in range(12):
        for _ in range(2):
            predicted, kept = copies(parameters), optimizer.state_dict()
            kept = {
                "state": {
                    key: {name: torch.as_tensor(value).clone() for name, value in values.items()}
                    for key, values in kept["state"].items()
                },
                "param_groups": kept["param_groups"],
            }
            advance(stepped, predicted, gradients(parameters, updates))
            assert_same(optimizer.state_dict(), kept)
        step(optimizer, gradients(parameters, updates))
        step(other, gradients(untold, updates))
        assert all(torch.equal(predicted[parameter], parameter) for parameter in parameters)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(parameters, untold, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_pieces_of_a_flat_parameter_are_predicted_as_the_whole(name):
    (flat,), optimizer, stepped = build(name, [(3 * 128 + 29,)])
    (group,) = optimizer.param_groups
    for updates in range(3):
        new = gradients([flat], updates)
        value = flat.detach().clone()
        expected = expected_gradient(stepped, group, flat, flat.detach())
        for start in range(0, flat.numel(), 128):
            cut = slice(start, start + 128)
            piece = piece_of(stepped, group, flat, cut)
            (weight,) = piece.param_groups[0]["params"]
            found = expected_gradient(piece, piece.param_groups[0], weight, weight)
            assert found is None if expected is None else torch.equal(found, expected[cut])
            advance(piece, {weight: value[cut]}, {weight: new[flat][cut].clone()})
        step(optimizer, new)
        assert torch.equal(value, flat)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_momentum_expects_after_many_equal_gradients_is_that_gradient(name):
    """Without a rate, so that a decay is of the same weights all the time."""
    parameters, optimizer, stepped = build(name, [(5, 3), (4,), (3,)], lr=0.0)
    for _ in range(300):
        step(optimizer, gradients(parameters, 7))
    for group in stepped.param_groups:
        for parameter in group["params"]:
            found = expected_gradient(stepped, group, parameter, parameter.detach())
            torch.testing.assert_close(found, gradients(parameters, 7)[parameter], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["FusedAdam", "DeepSpeedCPUAdam"])
def test_what_would_make_the_kernel_lose_count_is_named(name):
    from paci_schedule.adapters.deepspeed.adam import why_not_ahead

    _, optimizer, _ = build(name, [(5, 3), (4,)])
    assert not list(why_not_ahead(optimizer, PipelineSpec(stages=4, accumulation=3)))
    (reason,) = why_not_ahead(optimizer, PipelineSpec(stages=4, accumulation=2))
    assert all(words in reason for words in (name, "2 micro-batches", "2 updates ahead", "at least 3", "torch.optim"))
    optimizer.param_groups[1]["betas"] = (0.8, 0.99)
    (reason,) = why_not_ahead(optimizer, PipelineSpec(stages=4, accumulation=3))
    assert "betas" in reason


def test_two_steps_ahead_the_kernel_does_lose_count():
    """Were it not so, there would be nothing to refuse."""
    parameters, optimizer, stepped = build("DeepSpeedCPUAdam", [(50,)])
    untold, other, _ = build("DeepSpeedCPUAdam", [(50,)])
    for updates in range(30):
        advance(stepped, copies(parameters), gradients(parameters, updates), 2)
        step(optimizer, gradients(parameters, updates))
        step(other, gradients(untold, updates))
    assert not torch.equal(parameters[0], untold[0])


# ---- in the engine ---------------------------------------------------------------------------------------------------

JOBS = {
    "ZeRO-Offload, bf16, every": predicting("every", 2, 3, MIXED, config=OFFLOAD, precision="bf16-bf16"),
    "ZeRO-Offload, fp32, window": predicting("window", 2, 2, MIXED, config=OFFLOAD),
    "ZeRO-Offload, bf16, tied, window": predicting(
        "window", 2, 2, MIXED, config=OFFLOAD, precision="bf16-bf16", model="tied"
    ),
}


def follow_with_reference(folder: str) -> dict[str, Any]:
    """Jobs with DeepSpeedCPUAdam, and their references, which need the kernel as well."""
    import cpuinfo
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    class Replayed(DeepSpeedCPUAdam):
        """One that has counted every step which its state has seen, as one that is resumed has not."""

        def load_state_dict(self, state: dict[str, Any]) -> None:
            super().load_state_dict(state)
            nothing = [torch.empty(0)] * 4
            for number in range(max((one["step"] for one in state["state"].values()), default=0)):
                self.ds_opt_adam.adam_update(self.opt_id, number + 1, 0.1, 0.9, 0.999, 1e-8, 0.0, True, *nothing)

    results = {}
    # It takes a second, and is asked by every optimizer.
    with mock.patch.object(cpuinfo, "get_cpu_info", functools.cache(cpuinfo.get_cpu_info)):
        replayed = functools.partial(Replayed, lr=0.02)
        references = {name: reference_of(dataclasses.replace(job, optimizer=replayed)) for name, job in JOBS.items()}
    for number, (name, job) in enumerate(JOBS.items()):
        job = dataclasses.replace(job, optimizer=functools.partial(DeepSpeedCPUAdam, lr=0.02))
        results[name] = (
            deepspeed_job.follow(deepspeed_job.build(job), job, folder=f"{folder}/{number}"),
            references[name],
        )
    return results


def test_the_engine_predicts_with_deepspeed_cpu_adam(tmp_path):
    results = ranks.run_ranks(follow_with_reference, 2, (str(tmp_path),), timeout=900)
    for name in JOBS:
        deepspeed_job.assert_equal([result[name][0] for result in results], results[0][name][1])


def ask_for_fewer(folder: str) -> tuple[str, str, dict[str, Any]]:
    """What an engine says when it is told to accumulate too few micro-batches; it goes on all the same."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from paci_schedule.errors import UnsupportedError

    cpu_adam = functools.partial(DeepSpeedCPUAdam, lr=0.02)
    job = predicting("every", 3, 2, ("train x2", "drain"), config=OFFLOAD, optimizer=cpu_adam)
    engine = deepspeed_job.build(job)
    with pytest.raises(UnsupportedError) as asked_later:
        engine.set_train_batch_size(engine.train_micro_batch_size_per_gpu())
    followed = deepspeed_job.follow(engine, job, folder=folder)
    with pytest.raises(UnsupportedError) as asked_at_once:
        deepspeed_job.build(dataclasses.replace(job, accumulation=1))
    return str(asked_later.value), str(asked_at_once.value), followed


def test_fewer_micro_batches_than_the_kernel_can_count_are_refused(tmp_path):
    for asked_later, asked_at_once, followed in ranks.run_ranks(ask_for_fewer, 3, (str(tmp_path),), timeout=900):
        assert "1 micro-batches an update on 3 stages" in asked_later
        assert asked_later in asked_at_once
        assert followed["moments"][-1]["stats"]["version"] == 2

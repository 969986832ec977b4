"""Bad input gets one clear error on every rank, before training."""

import dataclasses
import os
from unittest import mock

import pytest
import torch
from torch import nn

from paci_schedule.adapters import versions
from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job

JOB = Job(stages=2, accumulation=2, script=("train",))


def assert_refused(error, config=None, *, target=deepspeed_job.build, args=(), says=()):
    """Every rank is refused with `error`, before training, by a message that says all of `says`."""
    job = Job(stages=2, accumulation=2, script=("train",), config=config or {})
    for outcome in ranks.gather_outcomes(target, 2, (job, *args), timeout=60):
        assert outcome.ended == "raised", outcome
        assert outcome.raised[0] == error, outcome.error
        message = outcome.error.rpartition(f"{error}: ")[2].lower()
        for words in says:
            assert words.lower() in message, f"no {words!r} in: {message}"


BAD_OPTIONS = [
    ({"pipeline_schedule": "pacci"}, ["pipeline_schedule", "'pacci'", "did you mean 'paci'?"]),
    ({"pipeline_schedule": "1F1B"}, ["'1F1B'", "'1f1b'"]),
    ({"pipeline_schedule": 3}, ["pipeline_schedule", "3"]),
    ({"paci": {"timeot": 5}}, ["timeot", "did you mean 'timeout'?"]),
    ({"paci": {"timeout": -1}}, ["timeout", "-1"]),
    ({"paci": {"timeout": "soon"}}, ["timeout", "soon"]),
    ({"paci": {"timeout": float("inf")}}, ["timeout", "inf", "finite", "600"]),
    ({"paci": {"timeout": 1e20}}, ["timeout", "1e+20", "2592000"]),
    ({"paci": {"timeout": True}}, ["timeout", "True"]),
    ({"paci": {"flush_warmup_steps": True}}, ["flush_warmup_steps", "True"]),
    ({"paci": {"extra_in_flight": [1, -1]}}, ["extra_in_flight", "[1, -1]"]),
    ({"paci": {"early_receives": 1}}, ["early_receives", "1"]),
    ({"paci": {"prediction": "every", "prediction_reach": 9}}, ["prediction_reach", "9", "at most 4"]),
    ({"paci": {"prediction": 2, "prediction_reach": 1.5}}, ["prediction_reach", "1.5", "prediction='every'"]),
    ({"paci": {"clip": "globl"}}, ["clip", "'globl'", "did you mean 'global'?"]),
    ({"paci": 7}, ["paci", "7"]),
    ({"pipeline_schedule": "PACI"}, ["'PACI'", "did you mean 'paci'?"]),
    ({"pipeline_schedule": "1f1b", "paci": {"timeot": 5}}, ["timeot", "did you mean 'timeout'?"]),
]


CANNOT_RUN = {
    "fp16 with dynamic loss scale": ({"fp16": {"enabled": True}}, ["fp16", "loss", "bf16"]),
    "ZeRO 2": ({"zero_optimization": {"stage": 2}}, ["zero", '"stage": 2']),
    "ZeRO 3": ({"zero_optimization": {"stage": 3}}, ["zero", '"stage": 3']),
    "random_ltd": (
        {
            "data_efficiency": {
                "enabled": True,
                "data_routing": {
                    "enabled": True,
                    "random_ltd": {
                        "enabled": True,
                        "total_layer_num": 2,
                        "random_ltd_layer_num": 1,
                        "random_ltd_layer_id": [0],
                        "model_mask_name": None,
                        "model_type": "decoder",
                        "hidden_state_order": "batch_seq_dim",
                        "random_ltd_schedule": {
                            "min_value": 2,
                            "max_value": 5,
                            "schedule_type": "fixed_linear",
                            "schedule_config": {"require_steps": 5, "seq_per_step": 1},
                        },
                    },
                },
            }
        },
        ["random_ltd"],
    ),
}


def refusals_of(configs):
    """What this rank says to each of several configs: the class of the error and its words, or "" and "" if none."""
    said = []
    for config in configs:
        try:
            deepspeed_job.build(dataclasses.replace(JOB, config=config))
            said.append(("", ""))
        except Exception as error:
            said.append((type(error).__name__, str(error)))
    return said


@pytest.fixture(scope="module")
def refusals():
    """What each rank says to the configs of both lists, by config as text."""
    configs = [config for config, _ in (*BAD_OPTIONS, *CANNOT_RUN.values())]
    results = ranks.run_ranks(refusals_of, 2, (configs,))
    return {str(config): said for config, *said in zip(configs, *results, strict=True)}


def assert_said(refusals, error, config, says):
    """Every rank is refused with `error`, by a message that has all of `says` in it."""
    for found, message in refusals[str(config)]:
        assert found == error, message
        for words in says:
            assert words.lower() in message.lower(), f"no {words!r} in: {message}"


@pytest.mark.parametrize(("config", "says"), BAD_OPTIONS, ids=str)
def test_bad_options_are_refused_by_name(refusals, config, says):
    assert_said(refusals, "ConfigError", config, says)


@pytest.mark.parametrize(("config", "says"), CANNOT_RUN.values(), ids=CANNOT_RUN)
def test_what_cannot_run_is_refused(refusals, config, says):
    assert_said(refusals, "UnsupportedError", config, says)


def build_unscheduled(job):
    """Build an engine whose config has options of a schedule that it does not name."""
    config = deepspeed_job.config(job, "paci")
    del config["pipeline_schedule"]
    with mock.patch.object(deepspeed_job, "config", return_value=config):
        deepspeed_job.build(job)


def test_options_without_a_schedule_are_refused():
    says = ['"paci": {...}', 'add "pipeline_schedule": "paci"', '"1f1b"']
    assert_refused("ConfigError", {"paci": {"clip": "stage"}}, target=build_unscheduled, says=says)


def build_blocking(job):
    with mock.patch.dict(os.environ, CUDA_LAUNCH_BLOCKING="1"):
        deepspeed_job.build(job)


BOUNDARY = {"activation_checkpointing": {"synchronize_checkpoint_boundary": True}}


@pytest.mark.parametrize(
    ("target", "config", "says"),
    [
        (build_blocking, {}, ["CUDA_LAUNCH_BLOCKING=1", "unset"]),
        (deepspeed_job.build, BOUNDARY, ["synchronize_checkpoint_boundary", "switch one of the two off"]),
    ],
    ids=["launch blocking", "checkpoint boundary"],
)
def test_early_receives_are_refused_where_the_device_is_synchronised(target, config, says):
    says = ['"early_receives": true', "in a circle", *says]
    assert_refused("UnsupportedError", {"paci": {"early_receives": True}, **config}, target=target, says=says)


def build_as_0_18_4_does(job):
    """There two kinds of optimizers have the same name, so DeepSpeed takes the wrong one for bf16."""
    with mock.patch("deepspeed.runtime.engine.DDP_BFLOAT16", "bf16"):
        deepspeed_job.build(job)


def test_bf16_is_refused_where_deepspeed_takes_an_optimizer_of_fp16_for_it():
    says = ["FP16_UnfusedOptimizer", "0.18.5", "under 1F1B too"]
    assert_refused("UnsupportedError", {"bf16": {"enabled": True}}, target=build_as_0_18_4_does, says=says)


def test_legacy_curriculum_is_refused_by_deepspeed_already():
    assert_refused("DeepSpeedConfigError", {"curriculum_learning": {"enabled": True}}, says=["curriculum_learning"])


def build_without_stages(job):
    """A model that is no pipeline: DeepSpeed's own engine without the key."""
    import deepspeed

    import paci_schedule

    paci_schedule.register("deepspeed")
    for schedule in (None, "1f1b", "paci"):
        model = nn.Linear(8, 8)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=jobs.optimizer(job),
            model_parameters=model.parameters(),
            config=deepspeed_job.config(job, schedule),
        )
        assert type(engine).__module__ == "deepspeed.runtime.engine"
        assert isinstance(engine, deepspeed.DeepSpeedEngine)
        assert not isinstance(engine, deepspeed.PipelineEngine)


def build_dual(job):
    """DeepSpeed's own other schedule."""
    import deepspeed
    from deepspeed.runtime.pipe.dualpipev import DualPipeVModule

    import paci_schedule

    paci_schedule.register("deepspeed")
    deepspeed.init_distributed(verbose=False)
    module = DualPipeVModule([nn.Linear(8, 8) for _ in range(4)], num_stages=2, loss_fn=jobs.loss)
    deepspeed.initialize(
        model=module,
        optimizer=jobs.optimizer(job),
        model_parameters=list(module.parameters()),
        config=deepspeed_job.config(job, "paci"),
    )


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (build_without_stages, ["class Linear", "a DeepSpeedEngine", "PipelineModule"]),
        (build_dual, ["class DualPipeVModule", "a DualPipeVEngine", "PipelineModule"]),
    ],
    ids=["no pipeline", "DualPipeV"],
)
def test_models_that_cannot_run_are_refused(target, says):
    assert_refused("UnsupportedError", target=target, says=says)


def build_under(job, version):
    """Build with a DeepSpeed that says it is of another version."""
    import importlib.metadata

    import deepspeed

    known = importlib.metadata.version
    importlib.metadata.version = lambda package: version if package == "deepspeed" else known(package)
    deepspeed.__version__ = version
    deepspeed_job.build(job)


@pytest.mark.parametrize("version", ["0.15.4", "1.0.0"])
def test_an_untested_deepspeed_is_a_warning_where_every_hook_is_there(version):
    [outcome] = ranks.gather_outcomes(build_under, 1, (dataclasses.replace(JOB, stages=1), version), timeout=60)
    assert outcome.ended == "returned", outcome.error
    assert outcome.output.count("outside the tested range") == 1
    assert all(word in outcome.output for word in (f"deepspeed {version}", *versions.DEEPSPEED.split(",")))


def test_an_untested_deepspeed_without_a_hook_is_refused():
    assert_refused("UnsupportedError", target=without_a_hook, args=("1.0.0",), says=["1.0.0", "_exec_optimizer_step"])


def without_a_hook(job, version=None):
    from deepspeed.runtime.pipe.engine import PipelineEngine

    del PipelineEngine._exec_optimizer_step
    deepspeed_job.build(job) if version is None else build_under(job, version)


def test_a_hook_that_is_gone_is_named():
    assert_refused("UnsupportedError", target=without_a_hook, says=["_exec_optimizer_step"])


def register_twice(job):
    import deepspeed

    import paci_schedule

    def hooks():
        return deepspeed.DeepSpeedEngine.__new__, deepspeed.PipelineEngine._exec_schedule

    before = hooks()
    paci_schedule.register()
    after = hooks()
    paci_schedule.register()
    return before == after, after == hooks()


def test_registering_again_changes_nothing():
    assert ranks.run_ranks(register_twice, 1, (JOB,)) == [(False, True)]


def test_training_without_gradients_is_refused_as_stock_does():
    outcomes = ranks.gather_outcomes(train_without_gradients, 2, (JOB,), timeout=60)
    for outcome in outcomes:
        assert outcome.raised[0] == "RuntimeError"
        assert "eval_batch" in outcome.error


def train_without_gradients(job):
    engine = deepspeed_job.build(job)
    with torch.no_grad():
        engine.train_batch(jobs.data(job.model))

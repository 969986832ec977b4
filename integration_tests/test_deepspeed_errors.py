"""Bad input gets one clear error on every rank before training; data that ends and ranks that die end well too."""

import os
import re
import time
from unittest import mock

import pytest
import torch
from torch import nn

from integration_tests import deepspeed_job, jobs, ranks
from integration_tests.jobs import Job
from integration_tests.reference.deepspeed import run as reference_of

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


@pytest.mark.parametrize(
    ("config", "says"),
    [
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
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(config, says):
    assert_refused("ConfigError", config, says=says)


def build_unscheduled(job):
    """With options, and no word on the schedule."""
    config = deepspeed_job.config(job, "paci")
    del config["pipeline_schedule"]
    with mock.patch.object(deepspeed_job, "config", return_value=config):
        deepspeed_job.build(job)


def test_options_without_a_schedule_are_refused():
    says = ['"paci": {...}', 'add "pipeline_schedule": "paci"', '"1f1b"']
    assert_refused("ConfigError", {"paci": {"clip": "stage"}}, target=build_unscheduled, says=says)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"fp16": {"enabled": True}}, ["fp16", "loss", "bf16"]),
        ({"zero_optimization": {"stage": 2}}, ["zero", '"stage": 2']),
        ({"zero_optimization": {"stage": 3}}, ["zero", '"stage": 3']),
        (
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
    ],
    ids=["fp16 with dynamic loss scale", "ZeRO 2", "ZeRO 3", "random_ltd"],
)
def test_what_cannot_run_is_refused(config, says):
    assert_refused("UnsupportedError", config, says=says)


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


def test_legacy_curriculum_is_refused_by_deepspeed_already():
    assert_refused("DeepSpeedConfigError", {"curriculum_learning": {"enabled": True}}, says=["curriculum_learning"])


def build_dynamic(job):
    deepspeed_job.build(job, dynamic_shape=True)


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


def build_experts(job):
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.pipe import PipelineModule

    import paci_schedule

    paci_schedule.register("deepspeed")
    deepspeed.init_distributed(verbose=False)
    experts = MoE(hidden_size=8, expert=nn.Linear(8, 8), num_experts=2)
    module = PipelineModule(
        [nn.Linear(8, 8), experts, nn.Linear(8, 8), nn.Linear(8, 8)],
        num_stages=2,
        loss_fn=jobs.loss,
        partition_method="uniform",
    )
    deepspeed.initialize(
        model=module,
        optimizer=jobs.optimizer(job),
        model_parameters=list(module.parameters()),
        config=deepspeed_job.config(job, "paci"),
    )


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (build_dynamic, ["dynamic_shape"]),
        (build_experts, ["MoE"]),
        (build_without_stages, ["class Linear", "a DeepSpeedEngine", "PipelineModule"]),
        (build_dual, ["class DualPipeVModule", "a DualPipeVEngine", "PipelineModule"]),
    ],
    ids=["dynamic shapes", "mixture of experts", "no pipeline", "DualPipeV"],
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


@pytest.mark.parametrize("version", ["0.18.3", "1.0.0"])
def test_an_untested_deepspeed_is_refused(version):
    assert_refused("UnsupportedError", target=build_under, args=(version,), says=[version, "0.19.8"])


def without_a_hook(job):
    from deepspeed.runtime.pipe.engine import PipelineEngine

    del PipelineEngine._exec_optimizer_step
    deepspeed_job.build(job)


def test_a_hook_that_is_gone_is_named():
    assert_refused("UnsupportedError", target=without_a_hook, says=["_exec_optimizer_step"])


def register_twice(job):
    import deepspeed

    import paci_schedule

    before = deepspeed.PipelineEngine
    assert not before.__module__.startswith("paci_schedule")
    for _ in range(3):
        paci_schedule.register()
    after = deepspeed.PipelineEngine
    paci_schedule.register()
    assert deepspeed.PipelineEngine is after
    return before is after


def test_registering_again_changes_nothing():
    assert ranks.run_ranks(register_twice, 1, (JOB,)) == [False]


# ---- data that ends -------------------------------------------------------------------------------------------------


def run_out(job, micro_batches, folder):
    """Train on a finite iterator until it ends; what the last call raised, and what the engine is like afterwards."""
    engine = deepspeed_job.build(job)
    source = jobs.data(job.model)
    feed = iter([next(source) for _ in range(micro_batches)])
    calls = 0
    while True:
        try:
            engine.train_batch(feed)
            calls += 1
        except StopIteration as ended:
            raised = [cls.__name__ for cls in type(ended).__mro__]
            message = str(ended)
            break
    stats, weights = engine.pipeline_stats(), deepspeed_job.weights(engine)
    engine.save_checkpoint(folder, tag="common")
    after = engine.train_batch(jobs.data(job.model, first=100)), engine.drain(), engine.pipeline_stats()["version"]
    return {"calls": calls, "raised": raised, "message": message, "stats": stats, "weights": weights, "on": after[2]}


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize(("accumulation", "left_over"), [(3, 0), (3, 1), (3, 2), (1, 0)])
def test_data_that_ends_drains_and_says_so_on_every_rank(stages, accumulation, left_over, tmp_path):
    """Two whole batches, and the start of a third or none of it.  The two count, once each; the rest does not."""
    job = Job(stages=stages, accumulation=accumulation, script=("train x2", "drain"))
    results = ranks.run_ranks(run_out, stages, (job, 2 * accumulation + left_over, str(tmp_path)))
    truth = reference_of(job)[-1]
    for stage, result in enumerate(results):
        assert result["calls"] == 2
        assert result["raised"][0] == "DataEndedError"
        assert "StopIteration" in result["raised"]
        assert str(accumulation) in result["message"]
        assert result["stats"]["in_flight"] == 0
        assert result["stats"]["version"] == 2
        assert all((result["weights"][name] == value).all() for name, value in truth.weights[stage].items())
        assert result["on"] == 3
    resumed = deepspeed_job.run(
        Job(stages=stages, accumulation=accumulation, script=("drain",)), folder=str(tmp_path), load=True
    )
    for stage, result in enumerate(resumed):
        weights = result["moments"][0]["weights"]
        assert all((weights[name] == value).all() for name, value in truth.weights[stage].items())


def give_loaders(job):
    """Loaders where iterators belong, refused; then a batch of a loader's iterator; then loaders, but at stage 1."""
    from paci_schedule import ConfigError

    engine = deepspeed_job.build(job)
    source = jobs.data(job.model)
    loader = torch.utils.data.DataLoader([next(source) for _ in range(4)], batch_size=None)
    for call in (engine.train_batch, engine.eval_batch):
        with pytest.raises(ConfigError, match=r"data_iter=DataLoader: .* iter\(loader\), or .*RepeatingLoader"):
            call(loader)
    assert engine.pipeline_stats()["forwards"] == 0
    engine.train_batch(iter(loader))
    engine.drain()
    assert engine.global_steps == 1
    engine.train_batch(None if engine.stage_id == 1 else loader)


def test_a_loader_is_no_iterator_and_is_refused():
    """Where it is given, before anything runs; a stage that is given nothing does not wait for ever."""
    job = Job(stages=3, accumulation=2, script=(), config={"paci": {"timeout": 10}})
    outcomes = ranks.gather_outcomes(give_loaders, 3, (job,), timeout=60)
    assert [outcome.raised[0] for outcome in outcomes] == ["ConfigError", "LinkError", "ConfigError"], outcomes


def hand_over_garbage(job):
    engine = deepspeed_job.build(job)
    engine.train_batch(iter(lambda: "nonsense", None))


def test_an_iterator_that_raises_something_else_is_not_swallowed():
    outcomes = ranks.gather_outcomes(
        hand_over_garbage, 2, (Job(stages=2, accumulation=2, script=(), config={"paci": {"timeout": 5}}),), timeout=60
    )
    assert all(outcome.ended == "raised" for outcome in outcomes)


# ---- ranks that die or hang -----------------------------------------------------------------------------------------

TIMEOUT = 5.0


def train_until_it_fails(engine, job):
    """Print how long that took."""
    feed = jobs.data(job.model)
    started = time.monotonic()
    try:
        for _ in range(50):
            engine.train_batch(feed)
    finally:
        print(f"waited {time.monotonic() - started:.3f}")


def lose_stage_one(job, how, at):
    """Train; stage 1 stops in its forward number `at`; 0: before it has passed on that there is a batch."""
    engine = deepspeed_job.build(job)
    if engine.stage_id == 1 and at == 0:
        os._exit(9)
    if engine.stage_id == 1:
        forwards = []

        def stop(*_):
            forwards.append(1)
            if len(forwards) == at:
                if how == "dies":
                    os._exit(9)
                if how == "raises":
                    raise ZeroDivisionError("stage one cannot go on")
                time.sleep(600)

        engine.module.forward_funcs[0].register_forward_pre_hook(stop)
    train_until_it_fails(engine, job)


@pytest.mark.parametrize(("how", "at"), [("dies", 0), ("dies", 1), ("dies", 6), ("raises", 6), ("hangs", 7)])
def test_a_lost_stage_ends_the_others_within_the_timeout(how, at):
    job = Job(stages=3, accumulation=2, script=(), config={"paci": {"timeout": TIMEOUT}})
    # A stage that hangs is the last to end: once the first of the others has given up, they all have.
    grace = 6.0 if how == "hangs" else TIMEOUT + 15
    outcomes = ranks.gather_outcomes(lose_stage_one, 3, (job, how, at), timeout=60, grace=grace)
    assert outcomes[1].ended == {"dies": "died", "hangs": "killed", "raises": "raised"}[how]
    for rank in (0, 2):
        outcome = outcomes[rank]
        assert outcome.ended == "raised", outcome
        assert outcome.raised[0] == "LinkError", outcome.error
        message = outcome.error.split("LinkError: ", 1)[1]
        assert f"stage {rank}" in message
        assert "stage 1" in message
        # A message's op; the first op of the batch where the word that there is one did not come.
        assert re.search(r"\b([ERS][AG]|F)\d+\b", message), message
        waited = float(outcome.output.rsplit("waited ", 1)[1].split()[0])
        assert waited < TIMEOUT + 15  # the job itself takes a moment, on a busy machine several


def lose_before_an_update(job, how, lost, schedule):
    """Train; the rank `lost` stops before it updates for the third time."""
    engine = deepspeed_job.build(job)
    engine.set_pipeline_schedule(schedule)
    if torch.distributed.get_rank() == lost:
        take_update = engine.take_update

        def stop(*args):
            if engine.global_steps == 2:
                os._exit(9) if how == "dies" else time.sleep(600)
            take_update(*args)

        engine.take_update = stop
    train_until_it_fails(engine, job)


def outcomes_of_the_others(world_size, how, lost, schedule="paci", **options):
    """Of ranks whose errors say which stage waited for what op; they came within the timeout."""
    config = {"paci": {"timeout": 3, "clip": "global"}, **options.pop("config", {})}
    job = Job(stages=2, accumulation=1, script=(), config=config, **options)
    args = job, how, lost, schedule
    grace = 3 if how == "hangs" else 15
    outcomes = ranks.gather_outcomes(lose_before_an_update, world_size, args, timeout=60, grace=grace)
    assert outcomes.pop(lost).ended == {"dies": "died", "hangs": "killed"}[how]
    for outcome in outcomes:
        assert outcome.raised[:1] == ("LinkError",), outcome
        message = outcome.error.rpartition("LinkError: ")[2]
        assert f"stage {outcome.rank * 2 // world_size} (rank {outcome.rank})" in message
        assert re.search(r"\b([ERS][AG]|F|B|STEP)\d+\b", message), message
        assert float(outcome.output.rsplit("waited ", 1)[1].split()[0]) < 3 + 15
    return outcomes


@pytest.mark.parametrize(("how", "lost"), [("dies", 0), ("dies", 3), ("hangs", 3)])
def test_a_lost_replica_ends_the_others_within_the_timeout(how, lost):
    beside = next(o for o in outcomes_of_the_others(4, how, lost) if o.rank == lost ^ 1)
    assert re.search(rf"\(STEP2\) together with the replicas of this stage \(rank {lost}\)", beside.error)


@pytest.mark.parametrize("precision", ["bf16", "bf16-bf16"])
def test_a_lost_replica_ends_the_others_whatever_the_optimizer(precision):
    beside = outcomes_of_the_others(
        4,
        "hangs",
        0,
        precision=precision,
        config={"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True},
    )[0]
    assert re.search(r"\(STEP2\) together with the replicas of this stage \(rank 0\)", beside.error)


def test_a_stage_that_is_lost_in_a_flush_ends_the_others_within_the_timeout():
    (first,) = outcomes_of_the_others(2, "hangs", 1, schedule="1f1b", clip=0.5)
    assert "(STEP0) together with the other stages and the slices of this stage (rank 1)" in first.error


def drain_alone(job, batches):
    """Stage 0 drains, stage 1 has gone to do something else."""
    engine = deepspeed_job.build(job)
    for _ in range(batches):
        engine.train_batch(jobs.data(job.model))
    if engine.stage_id == 1:
        time.sleep(600)
    engine.drain()


def evaluate_alone(job):
    engine = deepspeed_job.build(job)
    if engine.stage_id == 1:
        time.sleep(600)
    engine.eval_batch(jobs.data(job.model))


def test_an_evaluation_that_one_rank_misses_does_not_hang():
    job = Job(stages=2, accumulation=2, script=(), config={"paci": {"timeout": 3}})
    first, second = ranks.gather_outcomes(evaluate_alone, 2, (job,), timeout=60, grace=1)
    assert second.ended == "killed"
    assert first.raised[:1] == ("LinkError",), first
    assert "evaluated together with the other ranks (rank 1)" in first.error


@pytest.mark.parametrize("batches", [1, 0], ids=["waits for a gradient", "waits for the norms"])
def test_a_drain_that_one_rank_misses_does_not_hang(batches):
    job = Job(stages=2, accumulation=2, script=(), clip=0.5, config={"paci": {"timeout": 4, "clip": "global"}})
    first, second = ranks.gather_outcomes(drain_alone, 2, (job, batches), timeout=60, grace=1)
    assert second.ended == "killed"
    assert first.raised[:1] == ("LinkError",), first
    assert "stage 0" in first.error.rpartition("LinkError: ")[2]


def test_training_without_gradients_is_refused_as_stock_does():
    outcomes = ranks.gather_outcomes(train_without_gradients, 2, (JOB,), timeout=60)
    for outcome in outcomes:
        assert outcome.raised[0] == "RuntimeError"
        assert "eval_batch" in outcome.error


def train_without_gradients(job):
    engine = deepspeed_job.build(job)
    with torch.no_grad():
        engine.train_batch(jobs.data(job.model))

"""Predicted weights in the engine: as a rehearsal predicts, and as steps on copies of the masters do; never shown."""

from __future__ import annotations

import dataclasses
import functools
import math
from unittest import mock

import pytest
import torch

from integration_tests.test_deepspeed_replicas import follow_all
from integration_tests.test_rehearse import rehearsed
from paci_schedule.adapters.deepspeed import working
from paci_schedule.adapters.deepspeed.options import PaciOptions
from paci_schedule.adapters.deepspeed.prediction import build_prediction
from paci_schedule.core.drift import drift_of
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError, UnsupportedError
from testing import deepspeed_job, ranks
from testing.jobs import Job
from testing.reference.deepspeed import run as reference_of

PACI = ("train x5", "drain")
MIXED = ("train x5", "drain", "train x2", "eval", "train x4", "save", "train x2", "drain")


def predicting(
    prediction,
    stages,
    accumulation,
    script=PACI,
    extra_in_flight=0,
    by="global",
    flush_warmup_steps=0,
    config=(),
    reach=1.0,
    **more,
):
    paci = {
        "prediction": prediction,
        "prediction_reach": reach,
        "extra_in_flight": extra_in_flight,
        "clip": by,
        "flush_warmup_steps": flush_warmup_steps,
    }
    return Job(stages=stages, accumulation=accumulation, script=script, config={"paci": paci, **dict(config)}, **more)


# ---- as a rehearsal --------------------------------------------------------------------------------------------------

JOBS = {
    "P=2 a=1, every, Adam": predicting("every", 2, 1, optimizer="adam", warmup=True),
    "P=2 a=2, window, NAdam": predicting("window", 2, 2, optimizer="nadam", clip=0.6),
    "P=2 a=3, every, slack, groups": predicting("every", 2, 3, extra_in_flight=2, optimizer="groups", clip=0.6),
    "P=2 a=4, every second, slack": predicting(2, 2, 4, extra_in_flight=3, warmup=True),
    "P=3 a=1, window, SGD": predicting("window", 3, 1, optimizer="sgd", clip=0.9),
    "P=3 a=2, every, SGD": predicting("every", 3, 2, optimizer="sgd", warmup=True),
    "P=3 a=3, window, a stage without parameters": predicting("window", 3, 3, model="hollow", clip=0.4),
    "P=3 a=2, window, tuples": predicting("window", 3, 2, model="pairs", clip=1.4),
    "P=4 a=1, every second, NAdam": predicting(2, 4, 1, optimizer="nadam"),
    "P=4 a=2, every third, slack": predicting(3, 4, 2, extra_in_flight=2, clip=0.7, warmup=True),
    "P=4 a=3, window, groups": predicting("window", 4, 3, optimizer="groups", clip=0.6, warmup=True),
    "P=4 a=4, every": predicting("every", 4, 4, clip=0.6),
    "P=3 a=2, every, reaching further": predicting("every", 3, 2, clip=0.6, warmup=True, reach=1.5),
}
if hasattr(torch.optim, "Muon"):
    JOBS["P=4 a=2, window, Muon"] = predicting("window", 4, 2, model="matrices", optimizer="muon", clip=0.7)
    JOBS["P=2 a=2, every, Muon"] = predicting("every", 2, 2, model="matrices", optimizer="muon")


SLOW = {
    "P=2 a=3, every, slack, groups",
    "P=3 a=2, every, SGD",
    "P=3 a=2, window, tuples",
    "P=4 a=1, every second, NAdam",
    "P=4 a=3, window, groups",
    "P=4 a=4, every",
    "P=2 a=2, every, Muon",
}
CASES = deepspeed_job.cases(JOBS, SLOW)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return deepspeed_job.Runs(JOBS, tmp_path_factory.mktemp("predictions"), SLOW)


@pytest.mark.parametrize("name", CASES)
def test_the_engine_predicts_as_a_rehearsal(name, runs):
    job, results, shown = JOBS[name], runs[name], []
    stages, _ = rehearsed(job, lambda stages: shown.append([weights_of(job, *each) for each in enumerate(stages)]))
    shown.append([weights_of(job, *each) for each in enumerate(stages)])
    for number, result in enumerate(results):
        assert len(result["moments"]) == len(shown)
        for moment, truth in zip(result["moments"], shown, strict=True):
            assert moment["weights"].keys() == truth[number].keys()
            for key, value in truth[number].items():
                difference = (value - moment["weights"][key]).abs().max().item()
                assert difference == 0, f"{key} of stage {number} after {moment['action']} differs by {difference:.3g}"
    stages, _ = rehearsed(unpredicted(job))
    found = weights_of(job, 0, stages[0])
    last = results[0]["moments"][-1]["weights"]
    assert any((found[key] != value).any() for key, value in last.items()), "predictions change nothing"


@pytest.mark.parametrize("name", CASES)
def test_the_engine_predicts_as_often_as_the_option_says(name, runs):
    """A stage that trains something predicts at every stale forward, or at those of them that the option names."""
    job = JOBS[name]
    asked = job.options["prediction"]
    spec = PipelineSpec(
        stages=job.stages, accumulation=job.accumulation, extra_in_flight=job.options["extra_in_flight"]
    )
    for stage, result in enumerate(runs[name]):
        between = {}  # updates done before the forward -> stale forwards
        for micro_batch in range(5 * job.accumulation):
            if drift_of(spec, stage, micro_batch):
                done = max(0, micro_batch - spec.look_ahead(stage)) // job.accumulation
                between[done] = between.get(done, 0) + 1
        counts = {"every": between.values(), "window": [1] * len(between)}
        expected = counts[asked] if asked in counts else [-(-stale // asked) for stale in between.values()]
        assert result["moments"][-1]["stats"]["predictions"] == sum(expected)


def unpredicted(job):
    """The same job without predictions."""
    options = {**job.options, "prediction": "off", "prediction_reach": 1.0}
    return dataclasses.replace(job, config={**job.config, "paci": options})


def weights_of(job, stage, module):
    first = job.stage_layers(stage).start
    return {
        f"{first + place}.{key}": value.detach().clone()
        for place, layer in enumerate(module)
        for key, value in layer.named_parameters()
    }


# ---- as steps on copies, with masters, replicas and everything that comes between batches ----------------------------

ZERO = {
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000},
    "zero_allow_untested_optimizer": True,
}
ROUND_ROBIN = {**ZERO, "zero_optimization": {**ZERO["zero_optimization"], "round_robin_gradients": True}}
OFFLOAD = {
    "zero_optimization": {**ZERO["zero_optimization"], "offload_optimizer": {"device": "cpu"}},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
SWITCHING = ("train x2", "schedule=1f1b", "train x2", "schedule=paci", "train x3", "drain")
REFERENCED = {
    "fp32, every": predicting("every", 3, 2, MIXED, warmup=True),
    "fp32, window, clipping": predicting("window", 3, 1, MIXED, clip=0.4),
    "fp32, window, clipping by stage": predicting("window", 3, 3, MIXED, clip=0.4, by="stage"),
    "bf16, every": predicting("every", 3, 3, MIXED, precision="bf16", warmup=True),
    "bf16, every, reaching further": predicting("every", 3, 1, MIXED, precision="bf16", clip=0.6, reach=1.5),
    "bf16, window, clipping": predicting("window", 3, 2, MIXED, precision="bf16", clip=0.6, optimizer="groups"),
    "bf16, every second": predicting(2, 3, 1, MIXED, precision="bf16", clip=0.6),
    "bf16, window, a stage without parameters": predicting("window", 3, 3, MIXED, model="hollow", precision="bf16"),
    "bf16 sums, every third": predicting(3, 3, 4, MIXED, precision="bf16-bf16"),
    "accumulation changes on the way": predicting(
        "every", 3, 3, ("train x3", "accumulate=1", "train x4", "drain"), precision="bf16"
    ),
    "schedules change on the way": predicting("window", 3, 3, SWITCHING, clip=0.6, flush_warmup_steps=1),
    "schedules change on the way, bf16": predicting("every", 3, 3, SWITCHING, clip=0.6, precision="bf16"),
    "ZeRO-1, fp32, every": predicting("every", 3, 2, MIXED, config=ZERO, warmup=True, optimizer="groups"),
    "ZeRO-1, fp32, window, clipping": predicting("window", 3, 3, MIXED, config=ZERO, clip=0.4),
    "ZeRO-1, bf16, window": predicting("window", 3, 3, MIXED, config=ZERO, precision="bf16-bf16", optimizer="groups"),
    "ZeRO-1, bf16, every second, clipping, a stage without parameters": predicting(
        2, 3, 1, MIXED, model="hollow", config=ZERO, precision="bf16-bf16", clip=0.6
    ),
    "ZeRO-Offload, bf16, window, clipping": predicting("window", 3, 2, config=OFFLOAD, precision="bf16-bf16", clip=0.6),
    "ZeRO-Offload, bf16, fp32 sums, every": predicting("every", 3, 2, config=OFFLOAD, precision="bf16"),
    "tied, fp32, every, clipping": predicting("every", 3, 2, MIXED, model="tied", clip=2.0),
    "tied, fp32, window": predicting("window", 3, 3, MIXED, model="tied", optimizer="groups", warmup=True),
    "tied, bf16, every": predicting("every", 3, 3, MIXED, model="tied", precision="bf16"),
    "tied, bf16, window, clipping": predicting("window", 3, 1, MIXED, model="tied", precision="bf16", clip=2.5),
    "tied, ZeRO-1, fp32, every": predicting("every", 3, 2, SWITCHING, model="tied", config=ZERO),
    "tied, ZeRO-1, bf16, window, clipping": predicting(
        "window", 3, 3, MIXED, model="tied", config=ZERO, clip=2.0, precision="bf16-bf16"
    ),
}


FAST_REFERENCED = {  # every optimizer of DeepSpeed's once, with and without clipping
    "fp32, every",
    "fp32, window, clipping",
    "bf16, every, reaching further",
    "bf16, window, clipping",
    "accumulation changes on the way",
    "schedules change on the way",
    "ZeRO-1, fp32, every",
    "ZeRO-1, bf16, every second, clipping, a stage without parameters",
    "ZeRO-Offload, bf16, window, clipping",
    "tied, bf16, window, clipping",
    "tied, ZeRO-1, fp32, every",
}
SLOW_REFERENCED = REFERENCED.keys() - FAST_REFERENCED


@pytest.fixture(scope="module")
def referenced(tmp_path_factory):
    return deepspeed_job.Runs(REFERENCED, tmp_path_factory.mktemp("references"), SLOW_REFERENCED)


@pytest.mark.parametrize("name", deepspeed_job.cases(REFERENCED, SLOW_REFERENCED))
def test_the_engine_predicts_as_steps_on_copies(name, referenced):
    results = referenced[name]
    deepspeed_job.assert_as_reference(REFERENCED[name], results)
    last = reference_of(unpredicted(REFERENCED[name]))[-1].weights
    assert any(
        (result["moments"][-1]["weights"][key] != value).any()
        for result, weights in zip(results, last, strict=True)
        for key, value in weights.items()
    ), "predictions change nothing"


# ---- replicas, checkpoints, overflows, and what is refused -----------------------------------------------------------

REPLICATED = {
    "fp32": predicting("every", 2, 2, MIXED, clip=0.4),
    "bf16, every": predicting("every", 2, 2, MIXED, clip=0.4, precision="bf16"),
    "bf16, window, groups": predicting("window", 2, 3, MIXED, precision="bf16", optimizer="groups"),
    "bf16, window, slack": predicting("window", 2, 1, MIXED, precision="bf16", extra_in_flight=1),
    "ZeRO-1, fp32, every": predicting("every", 2, 2, MIXED, config=ZERO, optimizer="groups"),
    "ZeRO-1, bf16, window": predicting("window", 2, 3, MIXED, config=ZERO, precision="bf16-bf16"),
    "ZeRO-1, fp32, every second, slack, round robin": predicting(2, 2, 3, config=ROUND_ROBIN, extra_in_flight=2),
    "tied, ZeRO-1, fp32, window": predicting("window", 2, 2, ("train x5", "drain"), config=ZERO, model="tied"),
    "tied, bf16, every": predicting("every", 2, 2, ("train x5", "drain"), precision="bf16", model="tied"),
}
SLOW_REPLICATED = {"bf16, every", "bf16, window, slack", "ZeRO-1, fp32, every", "tied, ZeRO-1, fp32, window"}
RESUMED = {
    name: predicting("window", 2, 2, ("train x4", "save", "train x3", "drain"), clip=0.4, **more)
    for name, more in {
        "fp32": {},
        "bf16": {"precision": "bf16"},
        "ZeRO-1": {"precision": "bf16-bf16", "config": ZERO},
    }.items()
}
OVERFLOWING = {
    name: predicting("every", 2, 2, ("train x6", "drain"), poison=(0, 4, 3), **more)  # in update 2
    for name, more in {
        "bf16": {"precision": "bf16"},
        "ZeRO-1": {"config": ZERO},
        "tied, fp32": {"model": "tied"},
        "tied, bf16": {"model": "tied", "precision": "bf16"},
    }.items()
}
REFUSED = {
    "an optimizer that is not known": (
        {"config": {"optimizer": {"type": "Adagrad", "params": {"lr": 0.1}}}},
        ["Adagrad", "AdamW", "NAdam"],
    ),
    "a sparse embedding": ({"optimizer": "sgd", "model": "sparse"}, ["sparse=True", "dense"]),
}


def refused_job(name):
    more = dict(REFUSED[name][0])
    job = predicting("every", 2, 2)
    return dataclasses.replace(job, **{**more, "config": {**job.config, **more.get("config", {})}})


def why_not(build, job):
    """What the engine says when it is built; None if it does not refuse."""
    try:
        build(job)
    except UnsupportedError as error:
        return str(error)
    return None


def on_two_ranks(folder):
    results = {}
    for name, job in RESUMED.items():
        rest = dataclasses.replace(job, script=job.script[2:], first_micro_batch=4 * job.accumulation)
        whole = deepspeed_job.follow(deepspeed_job.build(job), job, folder=f"{folder}/{name}")
        engine = deepspeed_job.build(rest)
        engine.load_checkpoint(f"{folder}/{name}", tag="common")
        results[name] = whole, deepspeed_job.follow(engine, rest, folder=f"{folder}/rest")
    for name, job in OVERFLOWING.items():
        engine = deepspeed_job.build(job)
        results[f"overflow, {name}"] = deepspeed_job.follow(engine, job), engine.skipped_steps
    for name in REFUSED:
        results[name] = why_not(deepspeed_job.build, refused_job(name))
    engine = deepspeed_job.build(OVERFLOWING["ZeRO-1"])
    engine.optimizer.dtype = torch.float16  # a CPU has no fp16 of DeepSpeed's
    options = PaciOptions(prediction="every")
    results["fp16"] = why_not(lambda job: build_prediction(engine, options, spec_of(job), [], None), REPLICATED["fp32"])
    return results


def spec_of(job):
    return PipelineSpec(stages=job.stages, accumulation=job.accumulation)


def on_four_ranks(names, folder):
    with mock.patch.object(working, "PIECE", 100):  # masters are gone through in pieces, which changes nothing
        return follow_all({name: REPLICATED[name] for name in names}, folder)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return ranks.run_ranks(on_two_ranks, 2, (str(tmp_path_factory.mktemp("two")),), timeout=280)


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    """What the ranks found in the job of a name; the jobs of the slow tests run apart from the others."""

    @functools.cache
    def followed(slow):
        names = [name for name in REPLICATED if (name in SLOW_REPLICATED) == slow]
        return ranks.run_ranks(on_four_ranks, 4, (names, str(tmp_path_factory.mktemp("four"))), timeout=280)

    return lambda name: [results[name] for results in followed(name in SLOW_REPLICATED)]


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_predicts_with_the_clip_factor_of_the_last_update(name, on_two):
    for whole, resumed in (results[name] for results in on_two):
        for moment, truth in zip(resumed["moments"], whole["moments"][5:], strict=True):
            assert all(torch.equal(moment["weights"][key], value) for key, value in truth["weights"].items())


@pytest.mark.parametrize("name", OVERFLOWING)
def test_an_overflow_spoils_one_update_and_no_prediction(name, on_two):
    """The stage skips that update: forwards on a prediction from the infinite part would spoil all that follow.

    A stage with a tied weight skips none.
    """
    for stage, results in enumerate(on_two):
        followed, skipped = results[f"overflow, {name}"]
        assert skipped == (1 if stage == 0 and "tied" not in name else 0)
        assert all(value.isfinite().all() for value in followed["moments"][-1]["weights"].values())
        assert all(math.isfinite(moment["loss"]) for moment in followed["moments"][1:-1])


@pytest.mark.parametrize("name", [*REFUSED, "fp16"])
def test_what_cannot_be_predicted_is_refused_by_name(name, on_two):
    for results in on_two:
        for words in ["\"prediction\": 'every'", '"off"', *(REFUSED[name][1] if name in REFUSED else ["fp16"])]:
            assert words in results[name]


@pytest.mark.parametrize("name", deepspeed_job.cases(REPLICATED, SLOW_REPLICATED))
def test_replicas_predict_each_from_its_own_part(name, on_four):
    """All of its weights, or with masters its shard of them."""
    expected = reference_of(REPLICATED[name], 2)
    for replica in range(2):
        deepspeed_job.assert_equal(on_four(name)[replica::2], expected)


@pytest.mark.parametrize("name", deepspeed_job.cases(REPLICATED, SLOW_REPLICATED))
def test_predictions_ask_only_the_replicas_of_a_stage(name, on_four):
    """Every collective of two steady batches; tied weights have an asynchronous one of their own, in the pipeline."""
    for rank, result in enumerate(on_four(name)):
        tied = {(rank % 2, 2 + rank % 2)} if "tied" in name else set()
        spans = {tuple(members) for _, members in result["collectives"] if len(members) > 1}
        assert spans == {tuple(result["group"]), *tied}


@pytest.mark.parametrize("value", ["evry", 0, True, 1.5, None], ids=repr)
def test_a_bad_value_of_the_option_prediction_is_refused(value):
    with pytest.raises(ConfigError, match=rf'"paci": {{"prediction": {value!r}}}: must be .*"?every'):
        PaciOptions.read({"paci": {"prediction": value}})

"""Checkpoints: a resumed run goes on bit for bit, stock checkpoints load into PACI and back, exports come drained."""

import dataclasses
from pathlib import Path

import pytest

from paci_schedule.runtime.publication import MANIFEST
from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference.deepspeed import Reference
from testing.reference.deepspeed import run as reference_of

BY_STAGE = {"paci": {"clip": "stage"}}
MODELS = {
    "fp32": Job(stages=3, accumulation=2, script=(), warmup=True),
    "bf16": Job(
        stages=3,
        accumulation=3,
        script=(),
        precision="bf16",
        optimizer="groups",
        clip=0.4,
        warmup=True,
        config=BY_STAGE,
    ),
    "tuples": Job(stages=2, accumulation=2, script=(), model="pairs", optimizer="sgd"),
    "a stage without parameters": Job(
        stages=3, accumulation=2, script=(), model="hollow", precision="bf16", clip=0.4, config=BY_STAGE
    ),
    "a frozen stage": Job(stages=3, accumulation=2, script=(), model="frozen", clip=0.4, config=BY_STAGE),
    "one stage": Job(stages=1, accumulation=3, script=(), warmup=True),
}


def with_script(job, *script, done=0):
    """The job with this script, after `done` batches of data."""
    return dataclasses.replace(job, script=script, first_micro_batch=done * job.accumulation)


def counters(engine):
    return {"global_steps": engine.global_steps, "global_samples": engine.global_samples}


def assert_same_moments(results, others):
    for one, other in zip(results, others, strict=True):
        assert len(one["moments"]) <= len(other["moments"])
        for moment, truth in zip(reversed(one["moments"]), reversed(other["moments"]), strict=False):
            assert moment["action"] == truth["action"]
            assert moment["loss"] == pytest.approx(truth["loss"], rel=0, abs=0, nan_ok=True)
            assert moment["rate"] == truth["rate"]
            for name, value in truth["weights"].items():
                assert (moment["weights"][name] == value).all(), name


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_goes_on_bit_for_bit(name, tmp_path):
    """Weights, losses, learning rates and counters of the batches after the save, with the run that wrote it."""
    after = ("train x2", "eval", "train x2", "drain")
    whole = deepspeed_job.run(
        with_script(MODELS[name], "train x3", "save", *after), folder=str(tmp_path), inspect=counters
    )
    resumed = deepspeed_job.run(
        with_script(MODELS[name], *after, done=3), folder=str(tmp_path), load=True, inspect=counters
    )
    assert_same_moments(resumed, whole)
    samples = 3 * MODELS[name].accumulation  # a micro-batch has three
    for before, now in zip(whole, resumed, strict=True):
        assert before["inspected"] == now["inspected"] == {"global_steps": 7, "global_samples": 7 * samples}


@pytest.mark.parametrize("name", MODELS)
def test_a_run_that_loads_over_work_in_flight_starts_clean(name, tmp_path):
    """load_checkpoint in the middle of a run: what was in flight belongs to the past."""
    job = MODELS[name]
    results = ranks.run_ranks(load_at_once_and_late, job.stages, (job, str(tmp_path)))
    assert_same_moments(*zip(*results, strict=True))


def load_at_once_and_late(job, folder):
    """A checkpoint, and what comes after it: in a new engine, and in one that has trained two batches of other data."""
    deepspeed_job.train(with_script(job, "train x3", "save"), folder=folder)
    rest = with_script(job, "train x2", "drain", done=3)
    fresh = deepspeed_job.train(rest, folder=folder, load=True)
    engine = deepspeed_job.build(rest)
    for _ in range(2):
        engine.train_batch(jobs.data(job.model, first=777))
    engine.load_checkpoint(folder, tag="common")
    assert engine.pipeline_stats()["in_flight"] == 0
    return fresh, deepspeed_job.follow(engine, rest, folder=folder)


@pytest.mark.parametrize("name", ["fp32", "bf16", "one stage"])
def test_a_stock_checkpoint_loads_into_paci(name, tmp_path):
    job = dataclasses.replace(MODELS[name], clip=0.0)  # several stages: stock clips by the norm of the whole model
    saves, loads = with_script(job, "train x2", "save"), with_script(job, "train x3", "drain", done=2)
    folder = {"folder": str(tmp_path)}
    _, results = deepspeed_job.run_all((saves, "stock", folder), (loads, "paci", {**folder, "load": True}))
    truth = Reference(with_script(job, "train", "drain", "train", "drain"))
    truth.run()
    truth.forget_losses()  # a checkpoint of stock's has none
    expected = [truth.act(action) for action in loads.actions()]
    deepspeed_job.assert_equal(results, expected, counters=False)


@pytest.mark.parametrize("name", ["fp32", "bf16", "one stage"])
def test_a_paci_checkpoint_loads_into_stock(name, tmp_path):
    job = dataclasses.replace(MODELS[name], clip=0.0)
    saves, loads = with_script(job, "train x3", "save"), with_script(job, "train x2", done=3)
    folder = {"folder": str(tmp_path)}
    _, results = deepspeed_job.run_all((saves, "paci", folder), (loads, "stock", {**folder, "load": True}))
    expected = reference_of(with_script(job, "train x3", "drain", "train", "drain", "train", "drain"))
    for stage, result in enumerate(results):
        for moment, truth in zip(result["moments"], expected[5::2], strict=True):
            assert all((moment["weights"][key] == value).all() for key, value in truth.weights[stage].items())


def differing_signatures():
    """The methods that take other arguments than DeepSpeed's, with both signatures."""
    import inspect
    from itertools import chain

    from deepspeed.runtime.pipe.engine import PipelineEngine

    from paci_schedule.adapters.deepspeed import PaciPipelineEngine

    anything = [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]
    differing, compared = {}, 0
    before_stock = PaciPipelineEngine.__mro__[: PaciPipelineEngine.__mro__.index(PipelineEngine)]
    for name, method in chain.from_iterable(vars(base).items() for base in before_stock):
        if name == "__init__" or not inspect.isfunction(method) or not hasattr(PipelineEngine, name):
            continue
        compared += 1
        _, *mine = inspect.signature(method).parameters.values()
        _, *stock = inspect.signature(getattr(PipelineEngine, name)).parameters.values()
        takes = [parameter.kind for parameter in mine] == anything or [
            (parameter.name, parameter.kind, parameter.default or None) for parameter in mine
        ] == [(parameter.name, parameter.kind, parameter.default or None) for parameter in stock]
        if not takes:
            differing[name] = str(mine), str(stock)
    return differing, compared


def test_overridden_methods_take_what_stock_takes():
    """The arguments stand in the same order and have the same defaults; {} and None count as equal."""
    [(differing, compared)] = ranks.run_ranks(differing_signatures, 1)
    assert not differing
    assert compared >= 12


def test_without_a_tag_every_rank_saves_under_the_same_one(tmp_path):
    """Between drains the stages' step counters differ, and with them DeepSpeed's default tag."""
    steps = ranks.run_ranks(save_untagged, 3, (MODELS["fp32"], str(tmp_path)))
    assert steps == [{"before": before, "after": 3, "loaded": 3} for before in (2, 2, 3)]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["global_step3"]


def save_untagged(job, folder):
    engine = deepspeed_job.build(job)
    feed = jobs.data(job.model)
    for _ in range(3):
        engine.train_batch(feed)
    before = engine.global_steps
    engine.save_checkpoint(folder)
    after = engine.global_steps
    engine.train_batch(feed)
    engine.load_checkpoint(folder)
    return {"before": before, "after": after, "loaded": engine.global_steps}


CALLS = {
    "eval_batch": lambda engine, folder: engine.eval_batch(jobs.data("words")),
    "save_checkpoint": lambda engine, folder: engine.save_checkpoint(folder),
    "save_16bit_model": lambda engine, folder: engine.save_16bit_model(folder),
    "set_train_batch_size": lambda engine, folder: engine.set_train_batch_size(9),
    "set_train_micro_batch_size": lambda engine, folder: engine.set_train_micro_batch_size(2),
    "drain": lambda engine, folder: engine.drain(),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_needs_an_empty_pipe_drains_first(call, tmp_path):
    """Every stage is at the version of the last batch afterwards, whatever comes of the call in stock DeepSpeed."""
    job = MODELS["fp32"]
    paci = ranks.run_ranks(drained_by, 3, (job, "paci", call, str(tmp_path / "paci")))
    stock = ranks.run_ranks(drained_by, 3, (job, "stock", call, str(tmp_path / "stock")))
    for stage in range(3):
        assert paci[stage]["before"] == (min(2 - stage, 3), [2, 2, 3][stage])
        assert paci[stage]["after"] == (0, 3)
        assert paci[stage]["error"] == (stock[stage]["error"] if call != "drain" else None)
    files = [
        sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name != MANIFEST)
        for root in (tmp_path / "paci", tmp_path / "stock")
    ]
    assert files[0] == files[1]


def drained_by(job, schedule, call, folder):
    engine = deepspeed_job.build(job, schedule)
    feed = jobs.data(job.model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for _ in range(3):
        engine.train_batch(feed)
    seen, error = {}, None
    if schedule == "paci":
        stats = engine.pipeline_stats()
        seen["before"] = stats["in_flight"], stats["version"]
    try:
        CALLS[call](engine, folder)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}".replace(type(engine).__name__, "PipelineEngine")
    if schedule == "paci":
        stats = engine.pipeline_stats()
        seen["after"] = stats["in_flight"], stats["version"]
    return {**seen, "error": error}

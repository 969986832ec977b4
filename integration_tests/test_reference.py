"""The reference itself: drained after every batch it is stock 1F1B, undrained its drift is the closed form."""

import ast
import dataclasses
import functools
from pathlib import Path

import pytest

from paci_schedule import PipelineSpec
from paci_schedule.core.drift import drift_bound, drift_of
from testing import deepspeed_job, reference
from testing.jobs import Job
from testing.reference import rules
from testing.reference.deepspeed import Reference, run

ROOT = Path(__file__).parents[1]
BATCHES = ("train x2", "eval", "train x2")
STOCK = {
    "one stage clips": Job(stages=1, accumulation=3, script=BATCHES, clip=0.85, warmup=True),
    "one stage clips, bf16": Job(stages=1, accumulation=3, script=BATCHES, clip=0.6, precision="bf16"),
    "one stage clips, bf16 sums": Job(stages=1, accumulation=4, script=BATCHES, clip=0.55, precision="bf16-bf16"),
    "fp32": Job(stages=2, accumulation=3, script=BATCHES, warmup=True),
    "fp32, two optimizer groups": Job(stages=3, accumulation=2, script=BATCHES, model="pairs", optimizer="groups"),
    "bf16": Job(stages=3, accumulation=2, script=BATCHES, model="pairs", precision="bf16", warmup=True),
    "bf16 on an fp32 wire": Job(
        stages=2,
        accumulation=3,
        script=BATCHES,
        precision="bf16",
        optimizer="groups",
        config={"communication_data_type": "fp32"},
    ),
    "bf16 sums": Job(stages=2, accumulation=3, script=BATCHES, precision="bf16-bf16", optimizer="sgd"),
}


def flushed(job):
    """The moments of a job whose pipe is drained after every batch; stock tells every stage the last stage's loss."""
    reference, moments = Reference(job), []
    for action in job.actions():
        moment = reference.act(action)
        if action == "train":
            drained = reference.act("drain")
            moment = dataclasses.replace(drained, action=action, loss=moment.loss[-1:] * job.stages)
        moments.append(moment)
    return moments


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return deepspeed_job.Runs({name: (job, "stock") for name, job in STOCK.items()}, tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("name", STOCK)
def test_drained_after_every_batch_the_reference_is_stock_deepspeed(name, runs):
    deepspeed_job.assert_equal(runs[name], flushed(STOCK[name]), counters=False)


@pytest.mark.parametrize("name", [name for name, job in STOCK.items() if job.clip])
def test_stock_jobs_clip_at_some_updates_and_not_at_others(name):
    reference = Reference(STOCK[name])
    reference.run()
    factors = reference.factors()
    assert min(factors) < 1 < max(factors)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-bf16"])
@pytest.mark.parametrize("model", ["words", "pairs", "hollow"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "groups"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_drained_after_every_batch_every_combination_is_stock_deepspeed(stages, optimizer, model, precision):
    job = Job(
        stages=stages,
        accumulation=3,
        script=BATCHES,
        model=model,
        precision=precision,
        optimizer=optimizer,
        clip=0.6 if stages == 1 else 0.0,
        warmup=True,
    )
    deepspeed_job.assert_equal(deepspeed_job.run(job, schedule="stock"), flushed(job), counters=False)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 7])
@pytest.mark.parametrize("extra", [0, 2])
def test_drift_and_versions_of_the_reference_are_the_closed_form(stages, accumulation, extra):
    job = Job(
        stages=stages,
        accumulation=accumulation,
        script=("train x4", "drain", "train x3", "eval"),
        config={"paci": {"extra_in_flight": extra}},
        optimizer="sgd",
    )
    spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
    end = run(job)[-1]
    for stage in range(stages):
        expected = [drift_of(spec, stage, m) for m in range(4 * accumulation)]
        expected += [drift_of(spec, stage, m) for m in range(3 * accumulation)]
        assert end.drift[stage] == expected
        assert max(expected) <= drift_bound(spec, stage)
        assert (end.version[stage], end.live[stage]) == (7, 0)
        assert end.peak[stage] == min(spec.in_flight(stage), 4 * accumulation)


def test_the_reference_trains_otherwise_than_1f1b():
    """What the equivalence tests compare is not what 1F1B would have made, at any stage."""
    job = Job(stages=3, accumulation=2, script=("train x4", "drain"))
    late, flush = run(job)[-1], flushed(dataclasses.replace(job, script=("train x4",)))[-1]
    for stage in range(3):
        assert any((late.weights[stage][name] != flush.weights[stage][name]).any() for name in late.weights[stage])


def imported(path):
    """Dotted names that a file imports, at the top or inside of functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write the whole name, which this test reads"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_reference_shares_no_code_with_the_package():
    """Nor do the files that it imports: jobs, models, and what plays CUDA."""
    found, reached = sorted((ROOT / reference.__name__.replace(".", "/")).glob("*.py")), set()
    assert len(found) > 5
    while found:
        path = found.pop()
        reached.add(path)
        names = imported(path)
        assert not {name for name in names if name.partition(".")[0] == "paci_schedule"}, path
        files = {(ROOT / name.replace(".", "/")).with_suffix(".py") for name in names}
        found += [file for file in files - reached if file.is_file()]
    assert {path.name for path in reached} >= {"rules.py", "jobs.py", "megatron_model.py", "shim.py"}


def test_the_rules_name_these_updates():
    """P = 3, a = 2, d = 2, 1, 0, in a pipe that was never empty; written out by hand."""

    def norms_of(update, taken, **how):
        rule = functools.partial(rules.norm_update, ahead=[2, 1, 0], accumulation=2, emptied=0, taken=taken, **how)
        return [[rule(update, stage, other) for other in range(3)] for stage in range(3)]

    assert norms_of(3, 100) == [[3, 2, 2], [2, 3, 2], [1, 2, 3]]
    assert norms_of(3, 8) == [[3, 2, 2], [1, 3, 2], [1, 2, 3]]  # a drain: micro-batch 7 is the last one of all
    assert norms_of(3, 100, agreed=True) == [[1] * 3] * 3
    assert norms_of(3, 100, flushing=True) == [[3] * 3] * 3
    assert [rules.tied_delay(0, last, ahead=[2, 1, 0], accumulation=1) for last in (1, 2)] == [1, 2]
    assert rules.tied_updates(5, 3, 2) == [3]
    assert rules.tied_updates(5, 2, 2) == [2, 3]
    assert rules.tied_updates(1, 0, 2) == []
    assert rules.tied_updates(5, 3, 2, flushing=True) == [5, 3, 4]


def test_benchmarks_import_neither_tests_nor_training_programmes():
    """Directly, or through what they share with the tests."""
    paths = [path for folder in ("benchmarks", "testing") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 40
    for path in paths:
        assert not {name.partition(".")[0] for name in imported(path)} & {"tests", "integration_tests", "launch"}, path

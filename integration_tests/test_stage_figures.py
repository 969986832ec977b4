"""What every stage tells of its updates while it trains, where it is read, and the names of ops in a profile."""

import csv
import math

import pytest
import torch

from integration_tests.pretraining import CHECKOUTS, pretrain
from paci_schedule import PipelineSpec, trace
from paci_schedule.core.drift import drift_of
from testing import deepspeed_job, jobs, megatron_job, ranks, torch_job
from testing.jobs import Job
from testing.megatron_model import GptJob, set_up
from testing.reference.deepspeed import Reference

SAMPLES, LENGTH = 3, 5  # of a micro-batch


def tell_of_every_update():
    from paci_schedule.runtime.bulletin import Bulletin

    Bulletin.SECONDS = 0.0


def train_and_read(job):
    """Train with DeepSpeed, the newest batch under a profiler; what this stage then knows of all, and profiled ops."""
    tell_of_every_update()
    engine = deepspeed_job.build(job)
    feed = jobs.data(job.model)
    assert engine.stage_figures() == [None] * job.stages
    for _ in range(5):
        engine.train_batch(feed)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine.train_batch(feed)
    engine.drain()
    torch.distributed.barrier()
    return engine.stage_figures(), {event.key for event in profile.key_averages()}


def monitored(folder, stage, name):
    with open(folder / "job" / f"Train_Stage{stage}_{name}.csv", newline="") as file:
        _, *rows = csv.reader(file)
    return [(int(step), float(value)) for step, value in rows]


def test_every_stage_tells_its_updates_to_all_to_the_monitor_and_to_the_recording(tmp_path):
    config = {
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"},
        "paci": {"record": str(tmp_path / "run")},
    }
    job = Job(stages=3, accumulation=2, script=("train x6", "drain"), config=config)
    spec = PipelineSpec(stages=3, accumulation=2)
    reference = Reference(job)
    reference.run()
    expected = reference.window_losses()
    results = ranks.run_ranks(train_and_read, 3, (job,))

    told = trace.read_figures(tmp_path / "run")
    for stage in range(3):  # the first update is where counting begins
        assert [each.version for each in told[stage]] == [2, 3, 4, 5, 6]
        assert [each.loss for each in told[stage]] == pytest.approx(expected[stage][1:], abs=2e-6)
        assert [each.micro_batches for each in told[stage]] == [2] * 5
        assert [each.tokens for each in told[stage]] == [SAMPLES * LENGTH if stage == 0 else 0] * 5
        drifts = [max(drift_of(spec, stage, m) for m in (2 * u, 2 * u + 1)) for u in range(1, 6)]
        assert [each.drift for each in told[stage]] == drifts
        assert all(each.seconds > 0 < each.compute for each in told[stage])
        assert all(0 <= each.waiting_share <= 1 for each in told[stage])
    assert max(each.drift for each in told[0]) == 1

    for figures, _ in results:
        for stage, each in enumerate(figures):
            newest = told[stage][-1]
            assert each == {
                "version": 6,
                "drift": newest.drift,
                "waiting_share": pytest.approx(newest.waiting_share, abs=1e-3),
                "samples_per_second": pytest.approx(2 * SAMPLES / newest.seconds, rel=1e-2),
                "tokens_per_second": pytest.approx(2 * SAMPLES * LENGTH / newest.seconds, rel=1e-2),
                "loss": newest.loss,
            }

    for stage in range(3):
        for name in ("version", "drift", "waiting_share", "samples_per_second"):
            steps = [step for step, _ in monitored(tmp_path, stage, name)]
            assert steps == sorted(steps), name
        versions = [value for _, value in monitored(tmp_path, stage, "version")]
        assert versions == sorted(set(versions))
        assert 0 < len(versions) <= 5
        samples, tokens = (monitored(tmp_path, stage, f"{rate}_per_second") for rate in ("samples", "tokens"))
        assert all(value > 0 for _, value in samples)
        assert tokens == [(step, pytest.approx(LENGTH * value)) for step, value in samples][-len(tokens) :]

    for stage, (_, profiled) in enumerate(results):
        ahead = 2 - stage
        assert {"F10", "F11", f"B{10 - ahead}", f"B{11 - ahead}"} <= profiled
        assert any(name.startswith("STEP") for name in profiled)


def train_megatron(job):
    """Train with Megatron-core; what this stage then knows of all, and whether a profile has the names of ops."""
    from paci_schedule.adapters.megatron import stage_figures

    megatron_job.prepare()
    tell_of_every_update()
    set_up(job)
    built = []

    def build(job):
        built.append(megatron_job.wired(job))
        return built[-1]

    trained = megatron_job.train(job, build_stage=build)
    torch.distributed.barrier()
    return stage_figures(built[-1][0]), trained.stats["loss"]


def test_every_stage_of_megatron_tells_its_updates():
    job = GptJob(stages=2, accumulation=3, calls=4, paci={"train_iters": 4})
    for figures, loss in ranks.run_ranks(train_megatron, 2, (job,)):
        for each in figures:
            assert each.keys() == {"version", "drift", "waiting_share", "micro_batches_per_second", "loss"}
            assert each["version"] == 4
            assert each["loss"] == pytest.approx(loss, abs=2e-6)
            assert each["micro_batches_per_second"] > 0


def train_torch(job):
    tell_of_every_update()
    schedule, _ = torch_job.build(job)
    feed = jobs.data(job.model)
    for _ in range(4):
        inputs, labels = torch_job.whole_batch([next(feed) for _ in range(job.accumulation)])
        first = torch.distributed.get_rank() == 0
        schedule.step(*(inputs if first else ()), target=None if first else labels)
    schedule.drain()
    torch.distributed.barrier()
    return schedule.stage_figures()


def test_every_stage_of_torch_pipelining_tells_its_updates():
    job = Job(stages=2, accumulation=2, script=())
    for figures in ranks.run_ranks(train_torch, 2, (job,)):
        assert [each["version"] for each in figures] == [4, 4]
        assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], abs=2e-6)


WRITER = """
import runpy, sys
from unittest.mock import MagicMock
sys.path[0] = {checkout!r}
from megatron.training import global_vars
from paci_schedule.runtime.bulletin import Bulletin
Bulletin.SECONDS = 0.0

class Writer(MagicMock):
    def add_scalar(self, name, value, step):
        if name.startswith("stage-"):
            print("BOARD", name, value, step, flush=True)

class Wandb(MagicMock):
    def log(self, told, step):
        for name, value in told.items():
            if name.startswith("stage-"):
                print("WANDB", name, value, step, flush=True)

def stand_in(args):
    if args.rank == args.world_size - 1:
        global_vars._GLOBAL_TENSORBOARD_WRITER = Writer()
        global_vars._GLOBAL_WANDB_WRITER = Wandb()

global_vars._set_wandb_writer = stand_in
runpy.run_path({checkout!r} + "/pretrain_gpt.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkout", CHECKOUTS or [None])
def test_megatron_lm_writes_every_stage_to_tensorboard_and_wandb(checkout, tmp_path):
    if checkout is None:
        pytest.skip("MEGATRON_LM_CHECKOUT names no Megatron-LM checkout")
    script = tmp_path / "written.py"
    script.write_text(WRITER.format(checkout=checkout))
    flags = "--lr 1e-3 --train-iters 6 --untie-embeddings-and-output-weights --eval-iters 0 --eval-interval 100"
    said = pretrain(checkout, "paci", 2, flags, script=script)
    for writer in ("BOARD", "WANDB"):
        lines = [line.split() for line in said.splitlines() if line.startswith(writer)]
        names = {name for _, name, _, _ in lines}
        assert names == {
            f"stage-{stage}/{name}"
            for stage in (0, 1)
            for name in ("version", "drift", "waiting-share", "tokens-per-second")
        }
        for name in names:
            rows = [(int(step), float(value)) for _, each, value, step in lines if each == name]
            assert [step for step, _ in rows] == sorted(step for step, _ in rows)
            assert all(math.isfinite(value) for _, value in rows)
            if name.endswith("version"):
                assert all(0 < value <= step for step, value in rows)

"""What a training loop and rank 0's log and monitor are told, and that they speak of the update they name."""

import csv
import dataclasses
import math
import re
import sys
import time
import types

import pytest

from paci_schedule import PipelineSpec, trace
from paci_schedule.core.schedules import paci
from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference.deepspeed import Reference

SAMPLES = 3  # in a micro-batch


def steps_of(engine):
    return {"global_steps": engine.global_steps, "global_samples": engine.global_samples, "lr": engine.get_lr()}


@pytest.mark.parametrize(("stages", "accumulation"), [(3, 2), (4, 1), (2, 3)])
def test_steps_samples_and_rates_are_the_stage_s_own(stages, accumulation):
    """Between drains they differ from stage to stage, by what the stage has not yet updated."""
    job = Job(stages=stages, accumulation=accumulation, script=("train x5",), warmup=True)
    truth = Reference(job).run()[-1]
    results = deepspeed_job.run(job, inspect=steps_of)
    for stage, result in enumerate(results):
        version = truth.version[stage]
        assert result["inspected"] == {
            "global_steps": version,
            "lr": [truth.rate[stage]],
            "global_samples": version * accumulation * SAMPLES,
        }
    assert len(set(truth.version)) > 1
    assert len(set(truth.rate)) > 1


def scheduler_of_the_config(engine):
    return engine.get_lr()[0], engine.lr_scheduler.last_batch_iteration


def test_a_scheduler_of_the_config_steps_with_the_stage():
    """DeepSpeed's WarmupLR, linear: after v updates the rate is 0.02 v / 5, or 0.02 from the fifth on."""
    config = {
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.02, "warmup_num_steps": 5, "warmup_type": "linear"},
        }
    }
    job = Job(stages=4, accumulation=1, script=("train x4",), config=config)
    versions = [
        moment["stats"]["version"]
        for moment in (result["moments"][-1] for result in deepspeed_job.run(job, inspect=scheduler_of_the_config))
    ]
    assert versions == [1, 2, 3, 4]
    stock = deepspeed_job.run(Job(stages=1, accumulation=1, script=("train x4",), config=config), "stock")
    rates = [moment["rate"] for moment in stock[0]["moments"]]
    for result in deepspeed_job.run(job):
        for moment in result["moments"]:
            version = moment["stats"]["version"]
            if version:
                assert moment["rate"] == rates[version - 1]


def windows(job):
    """Mean loss of the micro-batches of every update, by stage, from the reference."""
    reference = Reference(job)
    reference.run()
    return reference.window_losses()


def test_all_stages_see_the_same_loss_for_an_update():
    """The loss of a micro-batch does not depend on who asks; it only arrives later upstream."""
    by_stage = windows(Job(stages=3, accumulation=2, script=("train x5", "drain")))
    assert by_stage[0] == by_stage[1] == by_stage[2]
    assert len(set(by_stage[0])) == 5


def read(folder, name):
    """The rows of a monitor file: (sample count, value)."""
    with open(folder / "job" / f"{name}.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[0] == "step"
    return [(int(step), float(value)) for step, value in rows]


def monitored(folder, **config):
    return {"csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "job"}, **config}


MONITORED = {
    "P=3 a=2": Job(stages=3, accumulation=2, script=("train x6", "drain"), warmup=True),
    "P=4 a=1, drains between": Job(
        stages=4, accumulation=1, script=("train x5", "drain", "train x4", "drain"), warmup=True
    ),
    "one stage": Job(stages=1, accumulation=3, script=("train x4", "drain"), warmup=True),
    "bf16": Job(stages=2, accumulation=2, script=("train x4", "drain"), warmup=True, precision="bf16"),
}


@pytest.mark.parametrize("name", MONITORED)
def test_the_monitor_names_the_update_that_its_values_are_of(name, tmp_path):
    job = MONITORED[name]
    monitored_job = Job(**{**vars(job), "config": monitored(tmp_path)})
    deepspeed_job.run(monitored_job)
    reference = Reference(job)
    moments = reference.run()
    samples = [(update + 1) * job.accumulation * SAMPLES for update in range(moments[-1].version[0])]
    losses = read(tmp_path, "Train_Samples_train_loss")
    assert [step for step, _ in losses] == samples
    assert [value for _, value in losses] == pytest.approx(reference.window_losses()[0], rel=1e-6)
    rates = read(tmp_path, "Train_Samples_lr")
    assert [step for step, _ in rates] == samples
    assert len({value for _, value in rates}) > 1
    waiting = read(tmp_path, "Train_Samples_waiting_share")
    assert [step for step, _ in waiting] == samples
    assert all(0.0 <= value <= 1.0 for _, value in waiting)
    assert moments[-1].live == [0] * job.stages


def test_the_monitored_drift_is_that_of_the_update(tmp_path):
    """The largest drift of the update's own micro-batches: it falls after a drain."""
    job = MONITORED["P=4 a=1, drains between"]
    deepspeed_job.run(Job(**{**vars(job), "config": monitored(tmp_path)}))
    assert [value for _, value in read(tmp_path, "Train_Samples_drift")] == [0, 1, 2, 3, 3, 0, 1, 2, 3]


def test_the_monitored_drift_is_written_at_every_update(tmp_path):
    job = MONITORED["P=3 a=2"]
    deepspeed_job.run(Job(**{**vars(job), "config": monitored(tmp_path)}))
    samples = [(update + 1) * job.accumulation * SAMPLES for update in range(6)]
    assert read(tmp_path, "Train_Samples_drift") == list(zip(samples, [0, 1, 1, 1, 1, 1], strict=True))


def test_the_monitored_rate_is_the_one_stock_shows(tmp_path):
    """At one stage both engines write the same rows, whatever convention stock has for the rate of an update."""
    rows = []
    for schedule in ("paci", "stock"):
        job = Job(stages=1, accumulation=2, script=("train x4",), warmup=True, config=monitored(tmp_path / schedule))
        deepspeed_job.run(job, schedule)
        rows.append([read(tmp_path / schedule, f"Train_Samples_{name}")[:3] for name in ("lr", "train_loss")])
    assert rows[0] == rows[1]


def print_steps(job):
    """Train, drain and let rank 0 print."""
    engine = deepspeed_job.build(job)
    feed = jobs.data(job.model)
    for _ in range(7):
        engine.train_batch(feed)
    engine.drain()
    return engine.stage_id


def test_the_printed_line_names_the_update_that_its_loss_is_of():
    """Every second update: its number and the mean loss of its own micro-batches; only rank 0 prints."""
    job = Job(stages=3, accumulation=2, script=("train x7", "drain"), config={"steps_per_print": 2})
    outcomes = ranks.gather_outcomes(print_steps, 3, (job,))
    assert [outcome.ended for outcome in outcomes] == ["returned"] * 3, outcomes
    pattern = r"steps: (\d+) loss: ([\d.]+)"
    printed = [(int(step), float(loss)) for step, loss in re.findall(pattern, outcomes[0].output)]
    expected = windows(job)[0]
    assert printed == [(step, pytest.approx(expected[step - 1], abs=6e-5)) for step in (2, 4, 6)]
    assert re.findall(r"iter time \(s\): [\d.]+ samples/sec: [\d.]+", outcomes[0].output)
    assert not any(re.search(pattern, outcome.output) for outcome in outcomes[1:])


PAUSE = 0.1  # seconds after every batch


def print_rates(job, folder):
    """Three updates of two micro-batches, three of six; and in another engine, one of two after the six."""

    def train(engine, batches):
        for _ in range(batches):
            engine.train_batch(feed)
            time.sleep(PAUSE)

    feed, engine = jobs.data(job.model), deepspeed_job.build(job)
    for size in (2, 6):
        engine.set_train_batch_size(size * SAMPLES)
        train(engine, 3)
    engine.save_checkpoint(folder, tag="common")
    resumed = deepspeed_job.build(job)
    resumed.load_checkpoint(folder, tag="common")
    train(resumed, 1)
    resumed.drain()


def test_the_printed_rates_are_those_of_the_updates_since_the_last_line(tmp_path):
    """The rates stay right where the number of micro-batches changes and where a run goes on from a checkpoint."""
    job = Job(stages=2, accumulation=2, script=(), config={"steps_per_print": 1})
    first, _ = ranks.gather_outcomes(print_rates, 2, (job, str(tmp_path)))
    pattern = r"steps: (\d+) .* iter time \(s\): ([\d.]+) samples/sec: ([\d.]+)"
    lines = [tuple(map(float, line)) for line in re.findall(pattern, first.output)]
    assert [step for step, _, _ in lines] == [1, 2, 3, 4, 5, 6, 7], first
    for (step, seconds, rate), micro_batches in zip(lines, (2, 2, 2, 6, 6, 6, 2), strict=True):
        assert seconds * rate == pytest.approx(micro_batches * SAMPLES, rel=0.1), step
    assert lines[-1][1] >= PAUSE


def statistics(job):
    """pipeline_stats after some batches, twice in a row, and after a drain."""
    engine = deepspeed_job.build(job)
    feed = jobs.data(job.model)
    for _ in range(4):
        engine.train_batch(feed)
    first, second = engine.pipeline_stats(), engine.pipeline_stats()
    engine.drain()
    return first, second, engine.pipeline_stats()


def test_pipeline_stats_count_ops_drift_and_seconds():
    results = ranks.run_ranks(statistics, 4, (Job(stages=4, accumulation=2, script=()),))
    for stage, (first, second, drained) in enumerate(results):
        assert {
            key: first[key]
            for key in ("stage", "stages", "accumulation", "forwards", "in_flight", "peak_in_flight", "drift_bound")
        } == {
            "stage": stage,
            "stages": 4,
            "accumulation": 2,
            "forwards": 8,
            "in_flight": 3 - stage,
            "peak_in_flight": 4 - stage,
            "drift_bound": [2, 1, 1, 0][stage],
        }
        assert first["backwards"] == 8 - (3 - stage)
        assert first["version"] == first["backwards"] // 2
        assert first["max_drift"] <= first["drift_bound"]
        assert first["compute_seconds"] > 0
        assert first["wait_seconds"] >= 0
        assert second["compute_seconds"] == 0, "seconds are those since the last call"
        assert drained["compute_seconds"] > 0 or stage == 3
        assert (drained["version"], drained["in_flight"], drained["backwards"]) == (4, 0, 8)
        assert math.isfinite(drained["wait_seconds"])


def test_a_recorded_run_is_what_paci_trace_reads(tmp_path):
    job = Job(stages=3, accumulation=2, script=("train x4", "drain"), config={"paci": {"record": str(tmp_path)}})
    deepspeed_job.run(job)
    recordings = trace.merge([trace.read(path) for path in sorted(tmp_path.glob("*.jsonl"))])
    spec = PipelineSpec(stages=3, accumulation=2)
    for stage, (recording, row) in enumerate(zip(recordings, trace.timeline(recordings).rows, strict=True)):
        assert recording.stage == stage
        assert len(recording.data) == 4
        assert [str(span.op) for span in row] == [str(op) for op in paci.stream(spec, stage, 4)]


# ---- monitors and measurements of DeepSpeed's own -------------------------------------------------------------------


def stand_ins(events):
    """Modules in the place of the monitors' packages, which put what they are told into `events`."""

    class Writer:
        def __init__(self, log_dir):
            pass

        def add_scalar(self, name, value, step):
            events.append(("tensorboard", name, value, step))

        def flush(self):
            pass

    class Experiment:
        def __internal_api__log_metric__(self, name, value, step, **source):
            events.append(("comet", name, value, step))

    def log(data, step, commit):
        events.extend(("wandb", name, value, step) for name, value in data.items())

    return {
        "tensorboard": {},
        "torch.utils.tensorboard": {"SummaryWriter": Writer},
        "wandb": {"init": lambda **options: None, "log": log},
        "comet_ml": {"__version__": "3.50.0", "start": lambda **options: Experiment()},
    }


DIAGNOSED = Job(
    stages=2,
    accumulation=2,
    script=("train x3", "eval", "train x2", "drain"),
    config={
        "steps_per_print": 2,
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": True, "profile_step": 1},
        "comms_logger": {"enabled": True, "prof_all": True},
        "wandb": {"enabled": True},
        "comet": {"enabled": True, "samples_log_interval": 1},
    },
)


def train_diagnosed(job):
    """Train with every measurement and monitor that DeepSpeed has; what the monitors were told."""
    events = []
    for name, attributes in stand_ins(events).items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    return deepspeed_job.train(job), events


def test_every_monitor_runs_and_no_measurement_stops_a_job(tmp_path):
    """The steps that a monitor is told never go back: wandb would drop what comes late."""
    tensorboard = {"enabled": True, "output_path": str(tmp_path)}
    job = dataclasses.replace(DIAGNOSED, config={**DIAGNOSED.config, "tensorboard": tensorboard})
    outcomes = ranks.gather_outcomes(train_diagnosed, 2, (job,))
    assert [outcome.ended for outcome in outcomes] == ["returned"] * 2, outcomes
    reference = deepspeed_job.assert_as_reference(job, [outcome.value[0] for outcome in outcomes])
    for monitor in ("tensorboard", "wandb", "comet"):
        told = [event[1:] for event in outcomes[0].value[1] if event[0] == monitor]
        steps = [step for _, _, step in told]
        assert steps == sorted(steps), monitor
        losses = [value for name, value, _ in told if name == "Train/Samples/train_loss"]
        assert losses == pytest.approx(reference.window_losses()[0], rel=1e-6), monitor
        assert len([name for name, _, _ in told if name == "Train/Samples/eval_loss"]) == 1, monitor
    assert not outcomes[1].value[1]
    for key in ("wall_clock_breakdown", "flops_profiler"):
        assert [key in outcome.output.partition("switched off")[2] for outcome in outcomes] == [True, False]

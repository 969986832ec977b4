"""The training programme on two ranks: it learns, resumes exactly, and its replicas read what stages would."""

import json
import math
import shutil

import pytest

from launch import train_gpt
from launch.errors import LaunchError
from launch.runlog import read_log
from testing.ranks import run_ranks

SMALL = ["--blocks", "2", "--sequence-length", "32", "--micro-batch-size", "2", "--accumulation", "2", "--warm-up", "2"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} squared is {number * number}.\n" for number in range(2000)))
    return ["--data", str(path), "--cache", str(tmp_path / "cache")]


def train_and_tell(flags):
    """Train, and let every stage tell of every update."""
    from paci_schedule.runtime.bulletin import Bulletin

    Bulletin.SECONDS = 0.0
    train_gpt.main(flags)


def train(folder, *flags):
    """Train on two ranks; returns the log."""
    flags = [*SMALL, "--log-every", "1", "--output", str(folder), *flags]
    run_ranks(train_and_tell, 2, (flags,), timeout=180)
    return read_log(folder / "log.jsonl")


def losses(log, event="update"):
    return {record["update"]: record["loss"] for record in log if record["event"] == event}


@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_a_run_learns_and_resumes_exactly(schedule, text, tmp_path):
    flags = [*text, "--pipeline-schedule", schedule, "--updates", "12", "--save-every", "6", "--dropout", "0.1"]
    whole = train(tmp_path / "whole", *flags)
    assert losses(whole)[12] < losses(whole)[1] - 0.5
    assert losses(whole)[1] == pytest.approx(math.log(257), abs=0.3)

    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (tmp_path / "resumed" / "checkpoints" / "latest").write_text("update6")
    resumed = train(tmp_path / "resumed", *flags, "--resume")
    assert losses(resumed) == losses(whole)
    assert losses(resumed, "validation") == losses(whole, "validation")
    assert [record["event"] for record in resumed].count("end") == 1

    stages = resumed[-1]["stages"]
    assert [stage["stage"] for stage in stages] == [0, 1]
    if schedule == "paci":
        assert [stage["max_drift"] for stage in stages] == [stage["drift_bound"] for stage in stages] == [1, 0]
        assert all(stage["compute_seconds"] > 0 for stage in stages)
        told = [record for record in whole if record["event"] == "update" and "stages" in record]
        assert len(told) > 6
        for record in told:
            assert [stage["stage"] for stage in record["stages"]] == [0, 1]
            for stage in record["stages"]:
                assert 0 < stage["version"] <= record["update"]
                assert stage["tokens_per_second"] > 0
                assert 0 <= stage["waiting_share"] <= 1
        assert {stage["drift"] for record in told for stage in record["stages"]} == {0, 1}
    else:
        assert not any("stages" in record for record in whole if record["event"] == "update")


def test_a_measured_cut_is_kept_for_the_run_that_resumes(text, tmp_path):
    """Optimizer states are saved by stage: nothing is measured again on resuming."""
    flags = [*text, "--pipeline-schedule", "paci", "--partition", "profile", "--save-every", "2"]
    log = train(tmp_path, *flags, "--updates", "2")
    file = tmp_path / "cut.json"
    written = file.read_text()
    assert log[0]["cut"] == json.loads(written)["bounds"]
    resumed = train(tmp_path, *flags, "--updates", "4", "--resume")
    assert file.read_text() == written
    assert losses(resumed).keys() == {1, 2, 3, 4}


def test_a_cut_is_not_measured_on_an_unknown_micro_batch():
    with pytest.raises(LaunchError, match="--micro-batch-size"):
        train_gpt._measured_cut(None, {"train_batch_size": 8}, None, 2)


def test_two_replicas_of_one_stage_train_like_one_replica_of_two_stages(text, tmp_path):
    stages = train(tmp_path / "stages", *text, "--updates", "4")
    replicas = train(tmp_path / "replicas", *text, "--updates", "4", "--stages", "1", "--accumulation", "1")
    assert losses(replicas).keys() == losses(stages).keys()
    for update, loss in losses(stages).items():
        assert losses(replicas)[update] == pytest.approx(loss, rel=1e-4)

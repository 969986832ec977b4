"""The comparison's figures, from logs whose answers are known, and the log itself."""

import json

import pytest

from launch import compare
from launch.errors import LaunchError
from launch.runlog import RunLog, read_log

TOKENS = 1000


def write(folder, schedule, seconds, losses, stages, *, accumulation=3):
    """A run of 10 updates a record, validated at every record; `seconds` is when each record was written."""
    log = RunLog(folder)
    log.rewind(0)
    facts = {"stages": len(stages), "replicas": 1, "accumulation": accumulation, "optimizer": "AdamW"}
    facts |= {"prediction": "every", "prediction_reach": 1.5} if schedule == "paci" else {"prediction": None}
    log.write("start", schedule=schedule, device="cpu", model="tiny", parameters=3_000_000, data="text", **facts)
    for number, (at, loss) in enumerate(zip(seconds, losses, strict=True), start=1):
        where = {"update": 10 * number, "tokens": 10 * number * TOKENS, "seconds": at}
        log.write("update", **where, loss=loss + 0.25)
        log.write("validation", **where, loss=loss, perplexity=round(2.0**loss, 3))
    log.write("end", update=10 * len(losses), stages=stages)
    return folder


@pytest.fixture
def folders(tmp_path):
    flush_stages = [{"stage": stage, "replica": 0, "peak_memory": (700 - stage) * 2**20} for stage in (1, 0)]
    paci_stages = [
        {
            "stage": 0,
            "replica": 0,
            "peak_memory": 650 * 2**20,
            "max_drift": 1,
            "drift_bound": 1,
            "compute_seconds": 17.0,
            "wait_seconds": 2.0,
        },
        {
            "stage": 1,
            "replica": 0,
            "peak_memory": 640 * 2**20,
            "max_drift": 0,
            "drift_bound": 0,
            "compute_seconds": 18.0,
            "wait_seconds": 3.0,
        },
    ]
    return [
        write(tmp_path / "flush", "1f1b", [11.0, 18.0, 25.0, 33.0], [5.0, 3.0, 2.5, 2.0], flush_stages),
        write(tmp_path / "paci", "paci", [9.0, 14.0, 19.0, 24.0], [5.5, 3.5, 2.5, 1.9], paci_stages),
    ]


def cells(folders):
    return dict(compare.comparison([compare.summarise(folder) for folder in folders]))


def test_the_table_has_the_figures_of_the_logs(folders):
    table = cells(folders)
    assert table["an update, median"] == ["700.0 ms", "500.0 ms"], "the first record is start-up and is left out"
    assert table["speed-up"] == ["1", "1.400"]
    assert table["ideal, (a + P - 1) / a"] == ["", "1.333"]
    assert table["training time"] == ["33.0 s", "24.0 s"]
    assert table["updates"] == ["40", "40"]
    assert table["prediction"] == ["", "every, reach 1.5"]
    assert table["tokens"] == ["40,000", "40,000"]
    assert table["training loss"] == ["2.2500", "2.1500"]
    assert table["validation loss"] == ["2.0000", "1.9000"]
    assert table["perplexity"] == ["4.000", "3.732"]
    assert table["drift (bound)"] == ["none", "1 (1)"]
    assert table["waiting"] == ["not counted", "12.5%"]
    assert table["process memory, first"] == ["700 MiB", "650 MiB"]
    assert table["process memory, last"] == ["699 MiB", "640 MiB"]


def test_the_time_to_the_baselines_loss_lies_between_records(folders):
    flush, paci = cells(folders)["time to loss 2.0000"]
    assert flush == "33.0 s"
    assert paci == f"{19.0 + 5.0 * (2.5 - 2.0) / (2.5 - 1.9):.1f} s"
    assert cells(folders[::-1])["time to loss 1.9000"] == ["24.0 s", "not reached"]


@pytest.mark.parametrize(("stages", "accumulation", "ideal"), [(8, 8, 1.875), (8, 16, 1.4375), (2, 2, 1.5), (1, 5, 1)])
def test_the_ideal_speed_up_is_the_papers_formula(stages, accumulation, ideal):
    assert compare.ideal_speed_up(stages, accumulation) == ideal


def test_the_command_prints_the_table_and_writes_a_picture(folders, tmp_path, capsys):
    compare.main([*map(str, folders), "--plot", str(tmp_path / "picture.png")])
    printed = capsys.readouterr().out
    assert "1.400" in printed
    assert "above the ideal" in printed, "1.400 of 1.333"
    assert "picture.png" in printed
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_or_absent_run_is_refused(folders, tmp_path, capsys):
    lines = (folders[1] / "log.jsonl").read_text().splitlines()
    (folders[1] / "log.jsonl").write_text("\n".join(lines[:-1]))
    for bad, message in ((folders[1], "has no record of end"), (tmp_path / "none", "no such file")):
        with pytest.raises(SystemExit) as stopped:
            compare.main([str(folders[0]), str(bad)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_a_resumed_log_goes_on_from_its_checkpoint(tmp_path):
    log = RunLog(tmp_path)
    log.write("start", schedule="paci")
    for update in (10, 20, 30):
        log.write("update", update=update, seconds=update / 4)
    log.write("end", update=30)
    assert log.rewind(20) == 5.0
    assert [record.get("update") for record in read_log(tmp_path / "log.jsonl")] == [None, 10, 20]
    assert log.rewind(0) == 0.0
    assert read_log(tmp_path / "log.jsonl") == []


def test_ranks_that_do_not_log_write_nothing(tmp_path):
    log = RunLog(None)
    log.write("start")
    assert log.rewind(0) == 0.0
    assert not list(tmp_path.iterdir())


def test_a_torn_line_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"event": "start"}) + '\n{"event": "upd')
    with pytest.raises(LaunchError, match="not JSON lines"):
        read_log(tmp_path / "log.jsonl")

"""Where the ranks stood when one was lost: the files that they leave, and what `paci doctor` makes of them."""

import json
import time

import pytest

from paci_schedule.cli import main
from paci_schedule.trace import read_all
from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job


def hang_at_the_second_stage(job):
    engine = deepspeed_job.build(job)
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 4:
            time.sleep(600)

    if engine.stage_id == 1:
        engine.module.forward_funcs[0].register_forward_pre_hook(stop)
    feed = jobs.data(job.model)
    for _ in range(20):
        engine.train_batch(feed)


def test_the_ranks_that_are_left_say_where_they_stood_and_whom_they_waited_for(tmp_path, capsys):
    """The stage that hangs is asked, and says where; it is the one to look at.  The recordings are there too."""
    job = Job(stages=3, accumulation=2, script=(), config={"paci": {"timeout": 6, "record": str(tmp_path)}})
    outcomes = ranks.gather_outcomes(hang_at_the_second_stage, 3, (job,), timeout=90, grace=8)
    assert [outcome.ended for outcome in outcomes] == ["raised", "killed", "raised"]
    first, hanging, last = read_all(tmp_path)
    assert (hanging.op, hanging.error, hanging.waits_for) == ("F3", "", [])
    assert "in stop\n    time.sleep(600)" in hanging.stack
    assert (first.rank, last.rank, first.stage, last.stage, last.stages) == (0, 2, 0, 2, 3)
    assert first.waits_for == last.waits_for == [1]
    assert (last.op, last.forwards, last.backwards) == ("RA3", 3, 3)
    assert last.posted[0] == "EA3: the activation of micro-batch 3 from rank 1"
    assert first.in_flight == first.forwards - first.backwards > 0
    assert [op for op, *_ in last.newest][-4:] == ["F2", "EA3", "B2", "SG2"]
    assert all(start <= end <= 0 for _, start, end in last.newest)
    assert "recv_activation" in last.stack
    assert (tmp_path / "stage2-replica0.jsonl").is_file()
    told = doctor(capsys, tmp_path, "--json")
    assert json.loads(told)["at_work"] == json.loads(told)["first"] == [1]
    assert json.loads(told)["missing"] == []
    assert json.loads(told)["waits"] == {"0": [1], "2": [1]}
    shown = doctor(capsys, tmp_path)
    assert "time.sleep(600)" in shown
    (tmp_path / "position-rank1.json").unlink()  # as if it had been killed
    assert json.loads(doctor(capsys, tmp_path, "--json"))["first"] == [1]
    assert "left nothing" in doctor(capsys, tmp_path)
    assert "Look first at rank 1." in shown


def doctor(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["doctor", *map(str, arguments)])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_what_is_no_position_is_one_line(tmp_path, capsys):
    for text, why in ((None, "no rank has left a position"), ("{}", "KeyError"), ("nonsense", "JSONDecodeError")):
        if text is not None:
            (tmp_path / "position-rank0.json").write_text(text)
        with pytest.raises(SystemExit) as end:
            main(["doctor", str(tmp_path)])
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert why in said
        assert said.count("\n") == 1

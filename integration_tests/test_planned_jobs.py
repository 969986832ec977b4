"""A printed plan is the job that was planned: each framework builds its stages with the plan's layers and bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paci_schedule import cli

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"n_layer": 12, "n_embd": 64, "n_head": 4, "vocab_size": 300, "n_positions": 32, "tie_word_embeddings": False}
PREDICTED = "--schedule paci --prediction every --recompute full"
PLANS = {  # command line -> global batch, micro-batch size
    "--devices 8 --stages 4 --global-batch 32 --micro-batch-size 4 --schedule paci": (32, 4),
    f"--devices 3 --stages 3 --global-batch 12 --micro-batch-size 2 {PREDICTED}": (12, 2),
    "--devices 2 --stages 2 --global-batch 12 --micro-batch-size 2 --schedule paci --tflops 1 --latency 1e-4": (12, 2),
}


def built(framework, capsys, folder):
    """For each plan: its row, its batch, its micro-batch size, and what the framework built of it."""
    model = folder / "config.json"
    model.write_text(json.dumps(MODEL))
    plans = []
    for number, line in enumerate(PLANS):
        with pytest.raises(SystemExit) as end:
            cli.main(["plan", "--model", str(model), "--memory", "1", "--json", *line.split()])
        assert end.value.code == 0
        plans.append(folder / f"plan{number}.json")
        plans[-1].write_text(capsys.readouterr().out)
    done = subprocess.run(
        [sys.executable, "-m", "integration_tests.planned", framework, model, *plans],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(plan.read_text())["settings"][framework]["row"] for plan in plans]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[{")]
    return [(row, *PLANS[line], stages) for line, row, stages in zip(PLANS, rows, found, strict=True)]


@pytest.mark.slow
def test_deepspeed_builds_what_was_planned(capsys, tmp_path):
    """An uneven partition with two replicas, predictions with recomputation, and slack."""
    plans = built("deepspeed", capsys, tmp_path)
    assert len({count for row, *_ in plans[:1] for count in row["layers"]}) > 1
    assert [any(row["extra_in_flight"]) for row, *_ in plans] == [False, False, True]
    for (row, batch, size, found), prediction in zip(plans, ("off", "every", "off"), strict=True):
        assert [each["layers"] for each in found] == row["layers"]
        assert [each["stage"] for each in found] == [*range(row["stages"])]
        for stage, each in enumerate(found):
            assert each["replicas"] == row["replicas"]
            assert each["batch"] == [batch, size, row["accumulation"]]
            assert (each["schedule"], each["prediction"]) == ("paci", prediction)
            assert each["recompute"] == int(row["recompute"])
            assert (each["slack"] or []) == row["extra_in_flight"]
            # Weights in bf16, their sums of gradients in fp32, and this replica's part of the masters.
            assert each["parameters"] == row["stage_parameters"][stage]
            assert each["weight_bytes"] == 2 * each["parameters"]
            assert each["gradient_bytes"] == pytest.approx(4 * each["parameters"], abs=1024)
            assert each["master_bytes"] == pytest.approx(4 * each["parameters"] / row["replicas"], abs=1024)


def test_megatron_builds_what_was_planned(capsys, tmp_path):
    """The same plans, the last one without slack, which Megatron does not have."""
    for (row, batch, size, found), prediction in zip(built("megatron", capsys, tmp_path), (0, 1, 0), strict=True):
        assert not row["extra_in_flight"]
        assert [each["layers"] for each in found] == row["layers"]
        assert [each["stage"] for each in found] == [*range(row["stages"])]
        assert [each["weight_bytes"] for each in found] == [2 * count for count in row["stage_parameters"]]
        flags = " ".join(found[0]["rest"])
        assert f"--micro-batch-size {size} --global-batch-size {batch}" in flags
        assert "--pipeline-schedule paci" in flags
        assert ("--paci-prediction every" in flags) == bool(prediction)

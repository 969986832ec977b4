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
PLANS = {
    "an uneven partition": ("--devices 8 --stages 4 --global-batch 32 --micro-batch-size 4 --schedule paci", 32, 4),
    "predictions": (
        "--devices 3 --stages 3 --global-batch 12 --micro-batch-size 2 --schedule paci --prediction every "
        "--recompute full",
        12,
        2,
    ),
    "slack": (
        "--devices 2 --stages 2 --global-batch 12 --micro-batch-size 2 --schedule paci --tflops 1 --latency 1e-4",
        12,
        2,
    ),
}


def printed(capsys, tmp_path, line):
    """The files of a model and of what `paci plan` prints for it."""
    model, plan = tmp_path / "config.json", tmp_path / "plan.json"
    model.write_text(json.dumps(MODEL))
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", "--model", str(model), "--memory", "1", "--json", *line.split()])
    plan.write_text(capsys.readouterr().out)
    assert end.value.code == 0
    return plan, model


def built(framework, plan, model):
    done = subprocess.run(
        [sys.executable, "-m", "testing.planned", framework, plan, model],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("name", PLANS)
def test_deepspeed_builds_what_was_planned(name, capsys, tmp_path):
    line, batch, size = PLANS[name]
    plan, model = printed(capsys, tmp_path, line)
    row = json.loads(plan.read_text())["settings"]["deepspeed"]["row"]
    found = built("deepspeed", plan, model)
    assert [each["layers"] for each in found] == row["layers"]
    assert [each["stage"] for each in found] == [*range(row["stages"])]
    assert any(row["extra_in_flight"]) == (name == "slack")
    for stage, each in enumerate(found):
        assert each["batch"] == [batch, size, row["accumulation"]]
        assert (each["schedule"], each["recompute"]) == ("paci", int(row["recompute"]))
        assert each["prediction"] == ("every" if "every" in line else "off")
        assert (each["slack"] or []) == row["extra_in_flight"]
        # Weights in bf16, their sums of gradients in fp32, and this replica's part of the masters.
        assert each["parameters"] == row["stage_parameters"][stage]
        assert each["weight_bytes"] == 2 * each["parameters"]
        assert each["gradient_bytes"] == pytest.approx(4 * each["parameters"], abs=1024)
        assert each["master_bytes"] == pytest.approx(4 * each["parameters"] / row["replicas"], abs=1024)


@pytest.mark.parametrize("name", PLANS)
def test_megatron_builds_what_was_planned(name, capsys, tmp_path):
    line, batch, size = PLANS[name]
    plan, model = printed(capsys, tmp_path, line)
    row = json.loads(plan.read_text())["settings"]["megatron"]["row"]
    found = built("megatron", plan, model)
    assert [each["layers"] for each in found] == row["layers"]
    assert [each["stage"] for each in found] == [*range(row["stages"])]
    assert [each["weight_bytes"] for each in found] == [2 * count for count in row["stage_parameters"]]
    assert not row["extra_in_flight"]  # the row without it is the one for Megatron
    flags = " ".join(found[0]["rest"])
    assert f"--micro-batch-size {size} --global-batch-size {batch}" in flags
    assert "--pipeline-schedule paci" in flags
    assert ("--paci-prediction every" in flags) == ("every" in line)

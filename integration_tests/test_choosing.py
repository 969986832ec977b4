"""docs/choosing.md: its programme runs, its JSON trains, its flags are flags."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from integration_tests.test_launch_train_gpt import text, train
from paci_schedule import launch
from paci_schedule.adapters.options import Options

__all__ = ["text"]

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "choosing.md").read_text()


def block(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    return found


def test_the_programme_compares_schedules_at_their_own_rates(capsys):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2, 4, 3, 2, 5, generator=generator)

    def build_stages(seed):
        torch.manual_seed(seed)
        return [torch.nn.Linear(5, 5) for _ in range(3)]

    def evaluate(stages):
        with torch.no_grad():
            return torch.nn.Sequential(*stages)(data[0, 0, 0]).square().mean().item()

    def batches(seed):
        return [list(zip(*pair, strict=True)) for pair in data.swapaxes(0, 1)]

    names = {
        "torch": torch,
        "ACCUMULATION": 3,
        "loss_fn": torch.nn.functional.mse_loss,
        "build_stages": build_stages,
        "evaluate": evaluate,
        "batches": batches,
    }
    exec(block("python"), names)
    found = names["found"]
    assert len(found) == 5 * 3 * 2
    assert len({loss for variant, loss in found.items() if not variant[3]}) == 4 * 3 * 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found)  # the first update of each
    assert {line.split()[0] for line in lines} == {"flush", "paci"}


def test_the_json_trains_with_predictions(text, tmp_path):
    config = tmp_path / "ds_config.json"
    given = json.loads(block("json"))
    given["paci"]["flush_warmup_steps"] -= 1999  # of three updates
    config.write_text(json.dumps(given))
    log = train(tmp_path / "run", *text, "--deepspeed-config", str(config), "--updates", "3")
    start = log[0]
    assert (start["schedule"], start["prediction"]) == ("paci", given["paci"]["prediction"])
    assert [stage["max_drift"] for stage in log[-1]["stages"]] == [1, 0]


@pytest.mark.parametrize(
    "flag", ["pipeline_schedule", "paci_prediction", "paci_prediction_reach", "paci_flush_warmup_steps"]
)
def test_the_flags_of_megatron_are_ours(flag):
    (line,) = re.findall(r"pretrain_gpt\.py \\\n(.*?)\n\n", DOCUMENT, re.DOTALL)
    ours, _ = launch.our_flags(Options).parse_known_args(shlex.split(line.replace("\\\n", " ").replace("...", "")))
    wanted = json.loads(block("json"))
    expected = {
        "pipeline_schedule": wanted["pipeline_schedule"],
        "paci_prediction": wanted["paci"]["prediction"],
        "paci_prediction_reach": wanted["paci"]["prediction_reach"],
        "paci_flush_warmup_steps": wanted["paci"]["flush_warmup_steps"],
    }
    assert getattr(ours, flag) == expected[flag]

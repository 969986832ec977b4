"""The DeepSpeed configurations of the training programme, and what flags put over them."""

import json
from pathlib import Path

import pytest

from launch.config import deepspeed_config
from launch.errors import LaunchError

CONFIGS = Path(__file__).resolve().parent.parent / "launch" / "configs"


@pytest.fixture
def path(tmp_path):
    adam = {"lr": 0.5, "betas": [0.8, 0.9], "weight_decay": 0.07, "torch_adam": True}
    config = {"train_batch_size": 15, "gradient_accumulation_steps": 5, "optimizer": {"type": "Adam", "params": adam}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path / "config.json"


def test_the_schedules_differ_by_one_key_alone(path):
    flush, paci = (deepspeed_config(path, pipeline_schedule=schedule) for schedule in ("1f1b", "paci"))
    assert (flush.pop("pipeline_schedule"), paci.pop("pipeline_schedule")) == ("1f1b", "paci")
    assert flush == paci == json.loads(path.read_text())


def test_a_prediction_goes_beside_the_options_that_are_there(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "paci": {"timeout": 7}}))
    config = deepspeed_config(path, pipeline_schedule="paci", prediction="every")
    assert config["paci"] == {"timeout": 7, "prediction": "every"}


def test_a_batch_of_parts_leaves_the_whole_to_deepspeed(path):
    config = deepspeed_config(path, micro_batch_size=3, accumulation=7)
    assert "train_batch_size" not in config
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 7


def test_nadamw_keeps_rate_betas_and_decay(path):
    config = deepspeed_config(path, optimizer="nadamw", learning_rate=0.25)
    kept = {"lr": 0.25, "betas": [0.8, 0.9], "weight_decay": 0.07}
    assert config["optimizer"] == {"type": "NAdam", "params": {**kept, "decoupled_weight_decay": True}}
    assert deepspeed_config(path, optimizer="adamw")["optimizer"]["type"] == "AdamW"


def test_what_is_no_configuration_is_refused(tmp_path):
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "bare.json").write_text('{"train_batch_size": 3}')
    rules = {"torn": "cannot be read as JSON", "absent": "cannot be read", "bare": "needs an optimizer with params"}
    for name, rule in rules.items():
        with pytest.raises(LaunchError, match=f"{name}.json'.*{rule}"):
            deepspeed_config(tmp_path / f"{name}.json")


def test_the_medium_recipe_has_the_papers_batch():
    config = deepspeed_config(CONFIGS / "gpt2_medium.json")
    assert config["gradient_accumulation_steps"] == 8
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] == 128
    assert config["optimizer"]["params"]["lr"] == pytest.approx(3e-4 * (128 / 256) ** 0.5, rel=1e-2)
    assert config["pipeline_schedule"] == "paci"
    assert config["bf16"]["enabled"]

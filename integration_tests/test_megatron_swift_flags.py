"""What of an ms-swift job is refused, under the names of its own flags; its trainer and its modules are stand-ins."""

import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.core", reason="Megatron-core is not installed")

from paci_schedule.adapters.megatron import swift

MAXIMUM, ALL = "reduce_max_stat_across_model_parallel_group", "logical_and_across_model_parallel_group"
FINE = {
    "rlhf_type": None,
    "task_type": "causal_lm",
    "tuner_type": "full",
    "freeze_parameters": [],
    "freeze_parameters_regex": None,
    "is_multimodal": False,
    "streaming": False,
    "num_train_epochs": 3,
    "async_save": False,
    "router_replay_mode": "disabled",
    "bridge_backend": "mcore-bridge",
    "sequence_packing_scheduler": None,
    "mtp_num_layers": None,
    "optimizer_cuda_graph": False,
    "padding_free": True,
    "calculate_per_token_loss": True,
}
REFUSED = {
    "--rlhf_type (rlhf_type='dpo')": {"rlhf_type": "dpo"},
    "--task_type (task_type='embedding')": {"task_type": "embedding"},
    "--tuner_type (tuner_type='lora')": {"tuner_type": "lora"},
    "--freeze_parameters (freeze_parameters=['output_layer'])": {"freeze_parameters": ["output_layer"]},
    "--freeze_parameters_regex (freeze_parameters_regex='.*')": {"freeze_parameters_regex": ".*"},
    "a multimodal --model (is_multimodal=True)": {"is_multimodal": True},
    "--streaming true with --num_train_epochs 3": {"streaming": True},
    "--async_save (async_save=True)": {"async_save": True},
    "--router_replay_mode (router_replay_mode='R2')": {"router_replay_mode": "R2"},
    "--bridge_backend (bridge_backend='megatron-bridge')": {"bridge_backend": "megatron-bridge"},
    "--sequence_packing_scheduler (sequence_packing_scheduler='dp_balanced')": {
        "sequence_packing_scheduler": "dp_balanced"
    },
    "--mtp_num_layers (mtp_num_layers=1)": {"mtp_num_layers": 1},
    "--optimizer_cuda_graph (optimizer_cuda_graph=True)": {"optimizer_cuda_graph": True},
}


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    names = {"trainers.base": {MAXIMUM: max, ALL: all}, "callbacks.print": {MAXIMUM: max}}
    for module, there in names.items():
        monkeypatch.setitem(sys.modules, f"swift.megatron.{module}", SimpleNamespace(**there))


def refused(settings, trainer="MegatronTrainer", experts=None):
    """The reasons that a user reads."""
    kind = type(trainer, (), {"__module__": "swift.megatron.trainers.trainer"})
    made = kind()
    made.state = SimpleNamespace(iteration=0, consumed_train_samples=0)
    made.args = SimpleNamespace(**{**FINE, **settings})
    made.config = SimpleNamespace(num_moe_experts=experts)
    job = swift.Swift(made)
    return [job.worded(reason) for reason in job.reasons()]


def test_the_defaults_of_a_job_run():
    assert refused({}) == []


@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_is_refused_by_its_name(flag):
    [reason] = refused(REFUSED[flag])
    assert reason.startswith(flag)
    assert len(reason) > len(flag) + 10  # why, and what to do


def test_another_trainer_is_refused_by_its_name():
    [reason] = refused({}, trainer="MyTrainer")
    assert reason.startswith("the trainer swift.megatron.trainers.trainer.MyTrainer: ")


def test_a_name_that_is_gone_is_said(monkeypatch):
    monkeypatch.delattr(sys.modules["swift.megatron.callbacks.print"], MAXIMUM)
    assert refused({}) == [f"swift.megatron.callbacks.print.{MAXIMUM} is gone in this ms-swift: use version 4.6"]


def test_another_loop_of_ms_swifts_is_refused_by_its_name():
    loop = {"__name__": "swift.ray.megatron.model_worker", "untried": swift.untried}
    exec("def train_step(): return list(untried())", loop)
    [reason] = loop["train_step"]()
    assert reason.startswith("swift.ray.megatron.model_worker.train_step: ")
    assert list(swift.untried()) == []

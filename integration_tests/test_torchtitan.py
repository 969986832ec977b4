"""torchtitan's own trainer, model, loss, metrics and checkpoints under "paci": one key of its config.

TORCHTITAN_PYTHON names a Python that has torchtitan 0.2.2, its requirements and the torch of constraints.txt; without
it these tests are skipped.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from testing.ranks import free_port

PYTHON = os.environ.get("TORCHTITAN_PYTHON")
ROOT = Path(__file__).parents[1]
ARGUMENTS = """
    --model.name llama3 --model.flavor debugmodel --model.hf_assets_path ./tests/assets/tokenizer
    --parallelism.pipeline_parallel_degree 2 --training.local_batch_size 4 --training.seq_len 32
    --training.dataset c4_test --training.steps 9 --metrics.log_freq 1 --lr_scheduler.warmup_steps 2 --debug.seed 5
    --checkpoint.enable --checkpoint.interval 3 --experimental.custom_import paci_schedule.adapters.torch.registered
"""

pytestmark = [
    pytest.mark.skipif(PYTHON is None, reason="TORCHTITAN_PYTHON names no Python with torchtitan"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the tokenizer and the data set that torchtitan's debug model reads."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("titan")
    lines = [f"The {number * 7919 % 97} sheep of the {number % 13} shepherds went home." for number in range(4000)]
    data = folder / "tests/assets/c4_test/data.json"
    data.parent.mkdir(parents=True)
    data.write_text("".join(json.dumps({"text": " ".join(lines[at : at + 20])}) + "\n" for at in range(0, 4000, 20)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>"]
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    assets = folder / "tests/assets/tokenizer"
    assets.mkdir()
    tokenizer.save(str(assets / "tokenizer.json"))
    (assets / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def trained(folder, name, schedule, *arguments):
    """The loss of every step, as the last stage's log has it."""
    port = free_port()
    processes, logs = [], []
    for rank in range(2):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": "0",  # there is one CPU
            "WORLD_SIZE": "2",
        }
        command = [
            PYTHON,
            "-m",
            "testing.titan_cpu",
            *ARGUMENTS.split(),
            "--parallelism.pipeline_parallel_schedule",
            schedule,
            "--job.dump_folder",
            str(folder / name),
            *arguments,
        ]
        logs.append(folder / f"{name}.{rank}.log")
        with open(logs[-1], "w") as log:
            processes.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log))
    try:
        for process in processes:
            process.wait(timeout=400)
    finally:
        for process in processes:
            process.kill()
    text = logs[1].read_text(errors="replace")
    assert all(process.returncode == 0 for process in processes), text[-3000:]
    found = re.findall(r"step:\D*?(\d+) .*?loss:\D*?(\d+\.\d+)", text.replace("\x1b[", "<"))
    return {int(re.sub(r"^\d*m", "", step)): float(loss) for step, loss in found}, logs[0].read_text(errors="replace")


def test_a_key_switches_a_stock_job_and_a_checkpoint_goes_on(folder):
    flushed, _ = trained(folder, "stock", "1F1B")
    losses, said = trained(folder, "paci", "paci")
    assert set(losses) == set(flushed) == set(range(1, 10))
    assert 'torch.distributed.pipelining runs the schedule "paci" on P = 2 stages' in said
    assert losses[1] == flushed[1]  # the same weights, the same data
    assert losses != flushed
    assert losses[9] < losses[1] - 0.3
    assert abs(losses[9] - flushed[9]) < 0.3
    shutil.rmtree(folder / "paci" / "checkpoint" / "step-9")
    resumed, _ = trained(folder, "paci", "paci")
    assert resumed == {step: losses[step] for step in (7, 8, 9)}

"""Megatron-Bridge's own training loop, recipes, logs and checkpoints under "paci": the launcher's flag alone.

MEGATRON_BRIDGE_CHECKOUT names a checkout whose 3rdparty/Megatron-LM is there, and MEGATRON_BRIDGE_PYTHON a Python with
its requirements and the torch of constraints.txt; without them these tests are skipped.  What they train for comparison
is the same model by Megatron-LM's pretrain_gpt.py under "paci", whose own tests hold it to the stock schedule and to a
reference.
"""

import json
import os
import re
import subprocess

import pytest
import yaml

from testing.megatron_lm import ROOT, logged, pretrained
from testing.ranks import free_port

CHECKOUT, PYTHON = (os.environ.get(f"MEGATRON_BRIDGE_{name}") for name in ("CHECKOUT", "PYTHON"))
MEGATRON_LM = f"{CHECKOUT}/3rdparty/Megatron-LM"
ADAM = "--lr 1e-2 --min-lr 1e-3 --adam-beta2 0.95 --weight-decay 0.033"

pytestmark = [
    pytest.mark.skipif(not (CHECKOUT and PYTHON), reason="MEGATRON_BRIDGE_CHECKOUT and _PYTHON name none"),
    pytest.mark.slow,
]


def trained(schedule, *overrides, script=ROOT / "testing" / "bridge_job.py", ranks=2, trace=None, expect=0):
    """What a job wrote that was started as its users start it."""
    module = ["testing.megatron_cpu", "testing.bridge_cpu", "paci_schedule.launch"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), f"{CHECKOUT}/src", MEGATRON_LM]),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "NO_VCS_VERSION": "1",
        **({"MEGATRON_CPU_TRACE": str(trace)} if trace else {}),
    }
    command = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    command += ["-m", *module, str(script), *(["--pipeline-schedule", schedule] if schedule else []), *overrides]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert (run.returncode == 0) == (expect == 0), (run.stdout + run.stderr)[-6000:]
    return run.stdout + run.stderr


def validated(said):
    return re.findall(r"validation loss at iteration (\d+) \| lm loss value: (\S+)", said)


def test_it_trains_what_megatron_lm_trains_and_a_resumed_run_goes_on(tmp_path):
    """Losses, norms and learning rates of a tied model, clipped, that saves and evaluates in between."""
    saves = [f"checkpoint.save={tmp_path}/ours", "checkpoint.save_interval=4"]
    common = ["train.train_iters=7", "validation.eval_interval=2", "validation.eval_iters=1"]
    said = trained("paci", *common, *saves, trace=tmp_path / "paci")
    assert 'runs the schedule "paci" on P = 2 stages, a = 3 micro-batches' in said
    evaluates = "--train-iters 7 --eval-interval 2 --eval-iters 1"
    run = pretrained(MEGATRON_LM, "paci", 2, ADAM, evaluates, f"--save {tmp_path}/theirs --save-interval 4")
    ours, theirs = logged(said), logged(run.stdout)
    assert list(ours) == [1, 2, 3, 4, 5, 6, 7]
    # Megatron-LM's first log line resets nothing, so the second one shows the mean loss of two iterations.
    assert float(theirs[2][2]) == pytest.approx((float(ours[1][2]) + float(ours[2][2])) / 2, abs=1e-6)
    assert [line for n, line in ours.items() if n != 2] == [line for n, line in theirs.items() if n != 2]
    assert (*ours[2][:2], ours[2][3]) == (*theirs[2][:2], theirs[2][3])
    assert [iteration for iteration, _ in validated(said)] == ["2", "4", "6"]
    for rank in range(2):
        seen = json.loads((tmp_path / f"paci.{rank}").read_text())
        steady = [ranks for iteration, _, ranks in seen if iteration == 2]  # after which it neither saves nor evaluates
        assert steady.count([rank]) > 0
        assert steady.count([0, 1]) == 1  # of the tied embedding, that nobody waits for
        assert steady.count([rank]) + 1 == len(steady)
    resumed = trained("paci", *common, f"checkpoint.load={tmp_path}/ours", "checkpoint.ckpt_step=4")
    assert logged(resumed) == {iteration: line for iteration, line in ours.items() if iteration > 4}
    for state in (tmp_path / "ours" / "iter_0000004" / "paci_schedule").iterdir():
        state.unlink()
    anew = trained("paci", *common, f"checkpoint.load={tmp_path}/ours", "checkpoint.ckpt_step=4")
    assert "for 0 of the 2 ranks of this topology" in anew
    assert logged(anew)[6] != ours[6]


EXPERTS = """
    model.num_moe_experts=4 model.expert_model_parallel_size=2 model.moe_router_load_balancing_type=aux_loss
    model.moe_aux_loss_coeff=0.1 model.moe_token_dispatcher_type=allgather model.moe_router_dtype=fp64
    model.add_bias_linear=false train.global_batch_size=4 ddp.use_distributed_optimizer=true
    optimizer.use_distributed_optimizer=true ddp.overlap_grad_reduce=true ddp.overlap_param_gather=true
"""
KINDS = {
    "four stages": (4, "model.pipeline_model_parallel_size=4 logger.log_params_norm=true"),
    "experts, late gathers": (2, EXPERTS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_learning_rate_of_0_the_log_is_the_stock_schedules(kind, tmp_path):
    """On four ranks; without our flag the script is stock, and sums over all stages are seen."""
    stages, overrides = KINDS[kind]
    still = "optimizer.lr=0 optimizer.min_lr=0 optimizer.clip_grad=0 train.train_iters=4 "
    still += f"validation.eval_interval=2 validation.eval_iters=1 {overrides}"
    paci = trained("paci", *still.split(), ranks=4, trace=tmp_path / "paci")
    stock = trained(None, *still.split(), ranks=4, trace=tmp_path / "stock")
    assert len(logged(paci)) == 4
    assert {key: value[:3] for key, value in logged(paci).items()} == {
        key: value[:3] for key, value in logged(stock).items()
    }
    assert validated(paci) == validated(stock)
    for name in re.findall("log_(params_norm)", overrides):
        norms = [re.findall(rf"{name.replace('_', ' ')}: (\S+)", said) for said in (paci, stock)]
        assert norms[0] == norms[1]
        assert len(norms[0]) == 4
    assert "paci_schedule" not in stock
    spans = {}
    for name in ("paci", "stock"):
        seen = json.loads((tmp_path / f"{name}.0").read_text())
        steady = [ranks for iteration, _, ranks in seen if iteration == 2]
        spans[name] = [ranks for ranks in steady if max(ranks) >= 4 // stages]
    assert spans["paci"] == [[0, 4 - 4 // stages]]  # of the tied embedding, that nobody waits for
    assert len(spans["stock"]) > 1


RECIPE = """
import runpy, sys
import megatron.bridge.recipes
from testing.bridge_job import small
megatron.bridge.recipes.small_pretrain_config = small
sys.argv[0] = {script!r}
if __name__ == "__main__":
    runpy.run_path({script!r}, run_name="__main__")
"""


def test_its_own_script_trains_a_recipe_with_our_flag(tmp_path):
    """run_recipe.py, of which our flag is taken before it reads its own; as a script that calls `pretrain` does."""
    script = tmp_path / "recipe.py"
    script.write_text(RECIPE.format(script=f"{CHECKOUT}/scripts/training/run_recipe.py"))
    chosen = ["--recipe", "small_pretrain_config", "--mode", "pretrain", "--step-func", "gpt_step", "--max_steps", "3"]
    said = trained("paci", *chosen, script=script)
    assert 'runs the schedule "paci" on P = 2 stages' in said
    assert logged(said) == logged(trained("paci", "train.train_iters=3"))
    assert len(logged(said)) == 3


ENDED = """
import os, signal, sys
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
from testing.bridge_job import small

class Ends(Callback):
    def on_train_step_start(self, context):
        if context.state.train_state.step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

if __name__ == "__main__":
    pretrain(process_config_with_overrides(small(), cli_overrides=sys.argv[1:]), forward_step, callbacks=[Ends()])
"""


def test_a_signal_ends_the_job_where_the_pipe_is_empty(tmp_path):
    """One rank hears it; every rank ends after the same iteration, and a resumed run goes on."""
    script = tmp_path / "ended.py"
    script.write_text(ENDED)
    saves = [f"checkpoint.save={tmp_path}/cut", "checkpoint.save_interval=100", "train.train_iters=11"]
    cut = logged(trained("paci", *saves, "train.exit_signal_handler=true", script=script))
    last = 2 + 2 * 1 + 4  # two iterations were done
    assert max(cut) == last
    assert (tmp_path / "cut" / "latest_checkpointed_iteration.txt").read_text() == str(last)
    written = yaml.safe_load((tmp_path / "cut" / f"iter_{last:07}" / "run_config.yaml").read_text())
    assert written["model"]["barrier_with_L1_time"] is True  # which is off while the job runs
    resumed = logged(trained("paci", "train.train_iters=11", f"checkpoint.load={tmp_path}/cut"))
    whole = [f"checkpoint.save={tmp_path}/whole", f"checkpoint.save_interval={last}", "train.train_iters=11"]
    assert cut | resumed == logged(trained("paci", *whole))


def test_what_cannot_run_is_refused_by_the_name_of_its_key(tmp_path):
    """All of it at once, before the first update."""
    keys = {
        "train.train_sync_interval": "2",
        "rerun_state_machine.rerun_mode": "validate_results",
        "dataset.dataloader_type": "batch",
        "train.empty_unused_memory_level": "1",
    }
    said = trained("paci", *(f"{key}={value}" for key, value in keys.items()), expect=1)
    assert "cannot run this job" in said
    assert [key for key in keys if key.rpartition(".")[2] + "=" not in said] == []
    assert logged(said) == {}


def test_a_resumed_run_finds_its_state_where_the_first_iterations_are_skipped(tmp_path):
    """The state is that of the checkpoint, and not of the first iteration that trains."""
    common = ["train.train_iters=8", "checkpoint.save_interval=4", "train.iterations_to_skip=[5,6]"]
    whole = logged(trained("paci", *common, f"checkpoint.save={tmp_path}"))
    said = trained("paci", *common, f"checkpoint.load={tmp_path}", "checkpoint.ckpt_step=4")
    assert "begins with nothing deferred" not in said
    assert sorted(whole) == sorted({*range(1, 5), *logged(said)})
    assert logged(said) == {iteration: line for iteration, line in whole.items() if iteration > 4}


def test_the_limit_of_time_ends_the_job_and_stays_in_its_config(tmp_path):
    """The config that Bridge writes into the checkpoint is the user's, so that a job that is built from it does not end
    at every multiple of that iteration, and has the same limit."""
    saves = [f"checkpoint.save={tmp_path}", "checkpoint.save_interval=1000", "train.train_iters=1000"]
    said = trained("paci", *saves, "train.exit_duration_in_mins=0.05")
    last = max(logged(said))
    assert f"--exit-duration-in-mins 0.05: this job ends after iteration {last}" in said
    written = yaml.safe_load((tmp_path / f"iter_{last:07}" / "run_config.yaml").read_text())["train"]
    assert (written["exit_duration_in_mins"], written["exit_interval"]) == (0.05, None)

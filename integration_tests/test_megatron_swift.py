"""ms-swift's own command, training loop, logs and checkpoints under "paci": one variable of the environment alone.

MEGATRON_SWIFT_CHECKOUT names a checkout, and MEGATRON_SWIFT_PYTHON a Python with its requirements and the torch and
megatron-core of constraints.txt; without them these tests are skipped.  What they train for comparison is the same
model by the stock schedule, and by a training loop of one's own under "paci", whose own tests hold it to a reference.
"""

import json
import os
import shlex
import subprocess

import pytest

from testing.megatron_lm import ROOT
from testing.ranks import free_port

CHECKOUT, PYTHON = (os.environ.get(f"MEGATRON_SWIFT_{name}") for name in ("CHECKOUT", "PYTHON"))
HELP = ROOT / "testing" / "swift_cpu"
JOB = shlex.split("""
    --model_type qwen2 --template dummy --split_dataset_ratio 0 --load_from_cache_file false --dataset_num_proc 1
    --dataloader_num_workers 0 --torch_dtype bfloat16 --ddp_backend gloo --pipeline_model_parallel_size 2
    --micro_batch_size 1 --global_batch_size 3 --train_iters 6 --max_length 64 --lr 1e-2 --min_lr 1e-3 --logging_steps 1
    --save_steps 100 --eval_iters 0 --check_model false --add_version false --use_distributed_optimizer false
    --gradient_accumulation_fusion false --masked_softmax_fusion false --bias_dropout_fusion false
    --bias_activation_fusion false --cross_entropy_loss_fusion false --callbacks marks
""")

pytestmark = [
    pytest.mark.skipif(not (CHECKOUT and PYTHON), reason="MEGATRON_SWIFT_CHECKOUT and _PYTHON name none"),
    pytest.mark.slow,
]


def environment(tmp_path, **further):
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [HELP / "site", ROOT, CHECKOUT])),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "USE_HF": "1",
        **{name: str(tmp_path / "cache") for name in ("HF_HOME", "MODELSCOPE_CACHE")},
        **further,
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of the model and its data."""
    folder = tmp_path_factory.mktemp("made")
    subprocess.run([PYTHON, "-m", "testing.swift_cpu.model", folder], env=environment(folder), check=True)
    return folder


@pytest.fixture
def train(made, tmp_path):
    def trained(
        schedule, *arguments, name="out", command="pt", ranks=2, trace=None, options=None, script=None, fails=0
    ):
        """Runs ms-swift's command as its users do, or a script; returns what it wrote, and its log by iteration."""
        variables = {
            **({"PACI_PIPELINE_SCHEDULE": schedule} if schedule else {}),
            **({"PACI_OPTIONS": json.dumps(options)} if options else {}),
            **({"MEGATRON_CPU_TRACE": str(trace)} if trace else {}),
        }
        port = str(free_port())
        if script:
            run = ["torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port, str(script)]
        else:
            run = ["swift.cli._megatron.main", command]
            variables |= {"NPROC_PER_NODE": str(ranks), "MASTER_PORT": port}
        data = ["--model", made / "model", "--dataset", made / "data.jsonl"]
        written = ["--output_dir", tmp_path / name, "--external_plugins", HELP / "marks.py"]
        given = [*JOB, *map(str, [*data, *written]), '--megatron_extra_kwargs={"persist_layer_norm": false}']
        run = subprocess.run(
            [PYTHON, "-m", *run, *given, *" ".join(arguments).split()],
            env=environment(tmp_path, **variables),
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        said = run.stdout + run.stderr
        assert (run.returncode == 0) == (fails == 0), said[-6000:]
        return said, logged(tmp_path / name)

    return trained


def logged(folder, names=("loss", "grad_norm", "learning_rate")):
    """iteration -> what is so called in the log, and ("eval", iteration) -> the loss of an evaluation."""
    file = folder / "logging.jsonl"
    lines = list(map(json.loads, file.read_text(encoding="utf-8").splitlines())) if file.exists() else []
    at = [(int(line["iteration"].partition("/")[0]), line) for line in lines if "iteration" in line]
    return {
        **{done: tuple(line[name] for name in names) for done, line in at if "loss" in line},
        **{("eval", done): line["eval_loss"] for done, line in at if "eval_loss" in line},
    }


def updates(log):
    """Without the evaluations, whose data a resumed run of ms-swift begins anew."""
    return {at: line for at, line in log.items() if isinstance(at, int)}


def steady(trace, rank, iteration=2):
    """The ranks of every collective that a rank took part in while it did an iteration."""
    seen = json.loads(trace.with_name(f"{trace.name}.{rank}").read_text())
    return [ranks for done, _, ranks in seen if done == iteration]


def test_it_trains_what_a_loop_of_ones_own_trains_and_a_resumed_run_goes_on(train, made, tmp_path):
    """Losses, norms and learning rates of a tied model, clipped, that saves and evaluates in between."""
    common = ["--train_iters 7 --save_steps 4 --eval_steps 2 --eval_iters 1", f"--val_dataset {made}/data.jsonl"]
    said, ours = train("paci", *common, name="ours", trace=tmp_path / "paci")
    assert 'runs the schedule "paci" on P = 2 stages, a = 3 micro-batches' in said
    _, own = train("paci", *common, name="own", script=HELP / "own_loop.py")
    assert list(own) == [1, 2, 3, 4, 5, 6, 7]
    assert updates(ours) == own
    assert [at for at in ours if at not in own] == [("eval", iteration) for iteration in (2, 4, 6, 7)]
    for rank in range(2):
        ranks = steady(tmp_path / "paci", rank)
        assert ranks.count([rank]) > 0
        assert ranks.count([0, 1]) == 1  # of the tied embedding, that nobody waits for
        assert ranks.count([rank]) + 1 == len(ranks)
    resume = f"--finetune false --mcore_model {tmp_path}/ours/checkpoint-4"
    _, resumed = train("paci", *common, resume, name="resumed")
    assert updates(resumed) == {at: line for at, line in updates(ours).items() if at > 4}
    for state in (tmp_path / "ours" / "checkpoint-4" / "iter_0000004" / "paci_schedule").iterdir():
        state.unlink()
    said, anew = train("paci", *common, resume, name="anew")
    assert "for 0 of the 2 ranks of this topology" in said
    assert anew[6] != ours[6]


KINDS = {
    "four stages": (4, "--pipeline_model_parallel_size 4"),
    "replicas, late gathers": (
        2,
        "--global_batch_size 4 --use_distributed_optimizer true --overlap_grad_reduce true --overlap_param_gather true",
    ),
    "padded, whose losses are means": (
        2,
        "--global_batch_size 4 --padding_free false --calculate_per_token_loss false",
    ),
    "two in one": (2, "--global_batch_size 8 --micro_batch_size 2"),
    "a stream of data": (2, "--global_batch_size 4 --streaming true"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_learning_rate_of_0_the_log_is_the_stock_schedules(kind, train, made, tmp_path):
    """On four ranks; without our variable the command is stock, and sums over all stages are seen."""
    stages, arguments = KINDS[kind]
    still = f"--lr 0 --min_lr 0 --clip_grad 0 --train_iters 4 {arguments} --eval_steps 2 --eval_iters 1"
    still += f" --val_dataset {made}/data.jsonl"
    _, paci = train("paci", still, name="ours", ranks=4, trace=tmp_path / "paci")
    said, stock = train(None, still, name="theirs", ranks=4, trace=tmp_path / "stock")
    assert "paci_schedule" not in said.replace(str(ROOT), "")
    assert [(at, line[::2] if isinstance(line, tuple) else line) for at, line in paci.items()] == [
        (at, line[::2] if isinstance(line, tuple) else line) for at, line in stock.items()
    ]
    assert len(stock) == 4 + 2
    spans = {
        name: [ranks for ranks in steady(tmp_path / name, 0) if max(ranks) >= 4 // stages] for name in ("paci", "stock")
    }
    assert spans["paci"] == [[0, 4 - 4 // stages]]  # of the tied embedding, that nobody waits for
    assert len(spans["stock"]) > 1


def test_without_drift_the_run_is_the_stock_schedules(train):
    """All updates of a job under a flush; the norm is summed in another order than Megatron-core's."""
    _, paci = train("paci", options={"flush_warmup_steps": 6}, name="ours")
    _, stock = train("1f1b", name="theirs")
    assert [line[::2] for line in paci.values()] == [line[::2] for line in stock.values()]
    assert [line[1] for line in paci.values()] == pytest.approx([line[1] for line in stock.values()], rel=1e-6)
    assert len(stock) == 6


EXPERTS = """
    --model_type qwen3_moe --moe_grouped_gemm false --perform_initialization true --save_safetensors false
    --moe_aux_loss_coeff 0.1 --moe_z_loss_coeff 0.1 --lr 0 --min_lr 0 --clip_grad 0 --logging_steps 2 --train_iters 8
"""


def test_the_metrics_of_experts_are_those_of_the_stock_schedule(train, made, tmp_path):
    """Means over iterations that are all alike, since what stages have in the log is one iteration apart.

    The first stage counts a micro-batch more in the first iteration, and one less in the last.
    """
    alike = f"{EXPERTS} --model {made}/experts --dataset {made}/same.jsonl"
    train("paci", alike, name="ours", trace=tmp_path / "paci")
    train(None, alike, name="theirs", trace=tmp_path / "stock")
    names = ("loss", "load_balancing_loss", "z_loss")
    ours, theirs = (logged(tmp_path / name, names) for name in ("ours", "theirs"))
    assert list(ours) == list(theirs) == [1, 2, 4, 6, 8]
    for at in (4, 6):
        assert min(theirs[at]) > 0
        assert ours[at] == pytest.approx(theirs[at], rel=1e-5)
    assert steady(tmp_path / "paci", 0, 3).count([0, 1]) == 1  # which writes a line: of the tied embedding
    assert steady(tmp_path / "stock", 0, 3).count([0, 1]) > 1 + len(names[1:])


REFUSED = {
    "--async_save (async_save=True)": "--async_save true",
    "--freeze_parameters (freeze_parameters=['decoder.layers'])": "--freeze_parameters decoder.layers",
    "--streaming true with --num_train_epochs 1": "--streaming true --num_train_epochs 1",
}


def test_what_cannot_run_is_refused_by_the_name_of_its_flag(train):
    """All of it at once, before the first update."""
    said, log = train("paci", *REFUSED.values(), fails=1)
    assert "cannot run this job" in said
    assert [flag for flag in REFUSED if flag not in said] == []
    assert log == {}


def test_what_megatron_lm_has_too_is_refused_by_the_same_name(train):
    said, log = train("paci", "--torch_dtype float16", fails=1)
    assert "--fp16 (fp16=True)" in said
    assert log == {}

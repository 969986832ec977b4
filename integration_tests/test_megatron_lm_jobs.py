"""Jobs of the real pretrain_gpt.py as production runs them: its other layers, its logs, its ends."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from integration_tests.pretraining import CHECKOUTS, ROOT, logged, pretrain, weights

pytestmark = pytest.mark.skipif(not CHECKOUTS, reason="MEGATRON_LM_CHECKOUT names no Megatron-LM checkout")


@pytest.fixture(params=CHECKOUTS, ids=lambda path: Path(path).name)
def checkout(request):
    return request.param


UNTIED = "--untie-embeddings-and-output-weights --clip-grad 0 --eval-iters 0 --eval-interval 100"
EXPERTS = (
    "--num-experts 4 --expert-model-parallel-size 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1 "
    "--moe-token-dispatcher-type allgather --moe-router-dtype fp64 --disable-bias-linear --global-batch-size 4"
)
SPREAD = "--context-parallel-size 2 --position-embedding-type rope"
LATENT = (
    "--multi-latent-attention --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 6 --kv-lora-rank 8 --q-lora-rank 8 "
    "--position-embedding-type rope --qk-layernorm"
)
CALCULATOR = "megatron/core/num_microbatches_calculator.py"
EXPERTS_LAYER = "megatron/core/transformer/moe/experts.py"
FURTHER_TOKENS = "megatron/core/transformer/multi_token_prediction.py"
KINDS = {
    "experts": (2, EXPERTS),
    "experts, all to all": (2, EXPERTS.replace("allgather", "alltoall")),
    "sequences over two ranks": (2, f"{SPREAD} --paci-prediction window"),
    "latent attention": (1, LATENT),
    "tokens of a batch": (1, "--calculate-per-token-loss"),
    "further tokens": (1, "--mtp-num-layers 1 --position-embedding-type rope"),
    "weights gathered late": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --bf16 --global-batch-size 4",
    ),
    "interleaved chunks": (
        1,
        "--num-layers-per-virtual-pipeline-stage 1 --overlap-moe-expert-parallel-comm --delay-wgrad-compute",
    ),
    "a layout of interleaved chunks": (1, "--pipeline-model-parallel-layout Et|t|t|tL"),
    "batches that grow": (1, "--rampup-batch-size 2 2 8 --global-batch-size 6"),
    "batches that grow in steps": (1, "--step-batch-size-schedule 0:2,192:4"),
    "batches made divisible": (
        2,
        "--rampup-batch-size 3 2 12 --global-batch-size 7 --decrease-batch-size-if-needed",
    ),
    "skipped iterations": (1, "--iterations-to-skip 3"),
}


def fitting(checkout, flags):
    """These flags of `KINDS` for this Megatron-LM; skips those that it does not know or does not run without a GPU."""
    has_steps = "step_batch_size" in Path(checkout, CALCULATOR).read_text(encoding="utf-8")
    if "--step-batch" in flags and not has_steps:
        pytest.skip("this Megatron-LM has no --step-batch-size-schedule")
    if "--mtp" in flags and "is_inference_column" in Path(checkout, FURTHER_TOKENS).read_text(encoding="utf-8"):
        pytest.skip("this Megatron-LM needs Transformer Engine for --mtp-num-layers")
    needs_evaluation = "--decrease-batch" in flags and has_steps  # of a size that the replicas can share
    return f"{flags} --eval-global-batch-size 6" if needs_evaluation else flags


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_learning_rate_of_0_the_loss_is_the_stock_schedules(checkout, kind):
    """Of jobs whose micro-batches, layers, weights or losses are of another kind."""
    replicas, flags = KINDS[kind][0], fitting(checkout, KINDS[kind][1])
    by_samples = "--rampup" in flags or "--step-batch" in flags
    length = "--train-samples 28 --lr-decay-samples 28" if by_samples else "--train-iters 5"
    plain = "" if "chunks" in kind else flags  # which stock refuses for two stages here
    still = f"--lr 0 --min-lr 0 {UNTIED} {length}"
    paci, stock = (
        {
            key: value[:3]
            for key, value in logged(pretrain(checkout, schedule, 2, still, chosen, replicas=replicas)).items()
        }
        for schedule, chosen in (("paci", flags), ("1f1b", plain))
    )
    assert len(paci) >= 4
    assert paci == stock


INSTANCES = "--use-distributed-optimizer --num-distributed-optimizer-instances 2 --bf16 --global-batch-size 4"
LEARNING = {
    "experts": (1, f"{EXPERTS} --expert-model-parallel-size 1"),
    "experts of two ranks": (2, EXPERTS),
    "experts computed together": (2, f"{EXPERTS} --moe-grouped-gemm --bf16"),
    "sequences over two ranks": (2, f"{SPREAD} {LATENT} --use-distributed-optimizer --calculate-per-token-loss"),
    "instances of the optimizer": (4, INSTANCES),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LEARNING)
def test_a_stage_learns_what_it_learns_under_the_stock_schedule(checkout, kind, tmp_path):
    """With a pipe that is empty after every update, all weights are those of the stock schedule, to the bit."""
    replicas, flags = LEARNING[kind]
    if "grouped" in flags and "grouped_gemm_util" not in Path(checkout, EXPERTS_LAYER).read_text(encoding="utf-8"):
        pytest.skip("this Megatron-LM needs Transformer Engine for --moe-grouped-gemm")
    common = f"--lr 1e-2 --min-lr 1e-3 --train-iters 6 --ckpt-format torch --save-interval 1 {UNTIED} {flags} --save"
    paci, stock = (
        logged(pretrain(checkout, schedule, 2, common, f"{tmp_path}/{schedule}", replicas=replicas))
        for schedule in ("paci", "1f1b")
    )
    # In the norm of the gradients the other stage's part is late; it limits nothing here.
    assert [line[:3] for line in paci.values()] == [line[:3] for line in stock.values()]
    assert stock[6][2] != stock[1][2]
    ranks = sorted(path.name for path in (tmp_path / "1f1b" / "iter_0000006").glob("mp_rank_*"))
    assert len(ranks) == 2 * (replicas if "experts" in kind else 1)
    for rank in ranks:
        ours, theirs = (weights(f"{tmp_path}/{schedule}/iter_0000006/{rank}") for schedule in ("paci", "1f1b"))
        assert len(theirs) > 10
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    states = list((tmp_path / "paci" / "iter_0000006" / "paci_schedule").iterdir())
    assert len(states) == 2 * (replicas if "distributed-optimizer" in flags else 1)


@pytest.mark.slow
def test_a_sequence_over_two_ranks_is_learnt_as_by_one(checkout):
    """So the attention that the tests put in the place of Transformer Engine's is right, and so are the sums."""
    flags = f"--lr 1e-2 --min-lr 1e-3 --train-iters 4 {UNTIED} --position-embedding-type rope"
    spread, whole = (
        logged(pretrain(checkout, "paci", 2, flags, f"--context-parallel-size {size}", replicas=size))
        for size in (2, 1)
    )
    for found, expected in zip(spread.values(), whole.values(), strict=True):
        assert found[0] == expected[0]
        assert [*map(float, found[2:])] == pytest.approx([*map(float, expected[2:])], rel=2e-3)
    assert len({line[2] for line in whole.values()}) == 4


METERS = """
import runpy, sys
sys.path[0] = {checkout!r}
import torch
from megatron.core import energy_monitor
energy_monitor.has_nvml = True
monitor = energy_monitor.EnergyMonitor
monitor.setup = monitor.shutdown = lambda self: None
monitor._get_energy = lambda self: 7
torch.cuda.temperature = torch.cuda.power_draw = torch.cuda.clock_rate = lambda *_: 0
runpy.run_path({checkout!r} + "/pretrain_gpt.py", run_name="__main__")
"""


@pytest.mark.slow
def test_energy_and_stragglers_are_asked_for_at_log_lines_alone(checkout, tmp_path):
    """There all ranks wait for all; in between none does."""
    script = tmp_path / "metered.py"
    script.write_text(METERS.format(checkout=checkout))
    flags = f"--lr 1e-3 --train-iters 9 {UNTIED} --log-interval 3 --log-energy --log-straggler"
    said = pretrain(checkout, "paci", 2, flags, script=script, trace=tmp_path / "paci")
    assert len(re.findall(r"iteration +[369]/ .*energy per GPU", said)) == 3
    assert said.count("MnRtt/Rnk") == 3
    for rank in range(2):
        seen = json.loads((tmp_path / f"paci.{rank}").read_text())
        waited = {iteration for iteration, _, ranks in seen if iteration is not None and len(ranks) > 1}
        between = {iteration for iteration in waited if 2 < iteration < 8}
        assert between
        assert len({iteration % 3 for iteration in between}) == 1, waited


DATA = """
import sys
from testing.megatron_cpu import shim
shim.install()
import numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
for seed, name in enumerate(sys.argv[1:]):
    tokens = numpy.random.default_rng(seed)
    builder = IndexedDatasetBuilder(name + ".bin", dtype=numpy.int32)
    for _ in range(6):
        builder.add_item(torch.from_numpy(tokens.integers(0, 127, 49, dtype=numpy.int32)))
        builder.end_document()
    builder.finalize(name + ".idx")
"""


@pytest.mark.slow
def test_whole_and_several_validation_sets_are_evaluated_as_under_the_stock_schedule(checkout, tmp_path):
    """Between two calls, with micro-batches in flight; training goes on with its own data.  Then without training."""
    names = [str(tmp_path / name) for name in ("train", "first", "second")]
    path = os.pathsep.join([str(ROOT), checkout])
    subprocess.run([sys.executable, "-c", DATA, *names], env={**os.environ, "PYTHONPATH": path}, check=True)
    flags = (
        f"--lr 0 --min-lr 0 --train-iters 5 {UNTIED} --eval-interval 2 --num-dataset-builder-threads 1 --seed 5 "
        f"--train-data-path {names[0]} --valid-data-path {names[1]} {names[2]} --full-validation "
        "--multiple-validation-sets"
    )
    paci, stock = (pretrain(checkout, schedule, 2, flags, real_data=True) for schedule in ("paci", "1f1b"))
    losses = re.findall(r"validation-\d loss at .*?lm loss value: \S+", paci)
    assert len(losses) >= 4
    assert len({loss.rpartition(" ")[2] for loss in losses}) == 2  # of two sets, with weights that stay
    assert losses == re.findall(r"validation-\d loss at .*?lm loss value: \S+", stock)
    assert {key: value[:3] for key, value in logged(paci).items()} == {
        key: value[:3] for key, value in logged(stock).items()
    }
    untrained = pretrain(checkout, "paci", 2, flags, "--skip-train", real_data=True)
    assert {loss.rpartition(" ")[2] for loss in re.findall(r"lm loss value: \S+", untrained)} == {
        loss.rpartition(" ")[2] for loss in losses
    }


@pytest.mark.slow
@pytest.mark.parametrize("flags", [EXPERTS, SPREAD], ids=["experts", "sequences over two ranks"])
def test_ranks_wait_for_their_stage_alone(checkout, flags, tmp_path):
    common = f"--lr 1e-3 --train-iters 5 {UNTIED} --log-params-norm --timing-log-level 2"
    said = pretrain(checkout, "paci", 2, common, flags, replicas=2, trace=tmp_path / "paci")
    assert said.count("load_balancing_loss") == 5 * (flags == EXPERTS)
    for rank in range(4):
        seen = json.loads((tmp_path / f"paci.{rank}").read_text())
        steady = [ranks for iteration, _, ranks in seen if iteration == 3]
        stage = {rank - rank % 2, rank - rank % 2 + 1}
        assert steady.count(sorted(stage)) > 0
        assert all(set(ranks) <= stage for ranks in steady), steady


@pytest.mark.slow
def test_the_embedding_that_predicts_further_tokens_is_one_weight(checkout, tmp_path):
    """Without a drain on the way, though no stage waits for the other's gradient."""
    flags = fitting(checkout, KINDS["further tokens"][1])
    common = f"--lr 1e-2 --min-lr 1e-2 {UNTIED} --ckpt-format torch --save-interval 100 --train-iters 5"
    pretrain(checkout, "paci", 2, common, flags, f"--save {tmp_path}")
    first, last = (weights(f"{tmp_path}/iter_0000005/mp_rank_00_{rank:03}") for rank in range(2))
    name = "embedding.word_embeddings.weight"
    assert torch.equal(first[name], last[name])
    assert not torch.equal(first[name], last["output_layer.weight"])


def squares(folder, iteration, stages):
    """The squared norm of the parameters of each stage, of a checkpoint in fp32."""
    return [
        sum(
            value.double().square().sum().item()
            for value in weights(f"{folder}/{iteration}/mp_rank_00_{rank:03}").values()
        )
        for rank in range(stages)
    ]


def test_the_norm_of_the_parameters_is_the_last_stages_and_that_of_others_before(checkout, tmp_path):
    """Of stage 0, with 3 micro-batches to an update, that of the update before, but where the pipe is empty."""
    common = f"--lr 1e-2 --min-lr 1e-2 {UNTIED} --ckpt-format torch --save-interval 100 --log-params-norm"
    found, norms = {}, {}
    for length in (2, 3, 5):
        folder = tmp_path / str(length)
        said = pretrain(checkout, "paci", 2, common, f"--train-iters {length} --save {folder}")
        norms[length] = [float(norm) for norm in re.findall(r"params norm: (\S+)", said)]
        found[length] = squares(folder, f"iter_{length:07}", 2)
    first, last = found[2][0], found[3][1]
    assert norms[5][2] == pytest.approx((first + last) ** 0.5, abs=1e-3)
    assert norms[3][2] == pytest.approx(sum(found[3]) ** 0.5, abs=1e-3)
    assert abs(norms[3][2] - norms[5][2]) > 5e-3


ENDED = """
import os, runpy, signal, sys
sys.path[0] = {checkout!r}
from megatron.training import training
step, calls = training.train_step, []
def train_step(*args, **kwargs):
    calls.append(0)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        {reason}
    return step(*args, **kwargs)
training.train_step = train_step
runpy.run_path({checkout!r} + "/pretrain_gpt.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--exit-signal-handler", "os.kill(os.getpid(), signal.SIGTERM)"),
        ("--exit-duration-in-mins 60", "training._TRAIN_START_TIME -= 3700"),
    ],
)
def test_an_end_that_nobody_planned_is_one_at_which_the_pipe_is_empty(checkout, flag, reason, tmp_path):
    """One rank has reason to end; every rank ends after the same iteration, and a resumed run goes on bit for bit."""
    script = tmp_path / "ended.py"
    script.write_text(ENDED.format(checkout=checkout, reason=reason))
    common = "--lr 1e-2 --min-lr 1e-3 --eval-iters 0 --eval-interval 100 --ckpt-format torch --train-iters 11 --save"
    cut, resumed, whole = (str(tmp_path / name) for name in ("cut", "resumed", "whole"))
    said = pretrain(checkout, "paci", 2, flag, common, cut, "--save-interval 100", script=script)
    last = int((tmp_path / "cut" / "latest_checkpointed_iteration.txt").read_text())
    assert last == 2 + 2 * 1 + 4  # two iterations were done
    assert max(logged(said)) == last
    pretrain(checkout, "paci", 2, common, resumed, f"--save-interval 100 --load {cut}")
    pretrain(checkout, "paci", 2, common, whole, f"--save-interval {last}")
    for rank in range(2):
        ours, theirs = (weights(f"{folder}/iter_0000011/mp_rank_00_{rank:03}") for folder in (resumed, whole))
        assert len(ours) > 10
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_precision_aware_optimizer_clips_and_steps_as_the_one_with_masters_of_megatrons(checkout):
    """Also where half of the weights is updated on the host.

    With a stand-in for Transformer Engine's FusedAdam, which leaves the arithmetic to PyTorch's.
    """
    job = "--lr 1e-2 --train-iters 5 --untie-embeddings-and-output-weights --eval-iters 0 --eval-interval 100 --bf16"
    job += " --clip-grad 0.3 --use-distributed-optimizer --global-batch-size 4"
    plain = logged(pretrain(checkout, "paci", 2, job, replicas=2))
    aware, offloaded = (
        pretrain(
            checkout,
            "paci",
            2,
            job,
            "--use-precision-aware-optimizer",
            further,
            replicas=2,
            script=ROOT / "testing" / "fused_adam.py",
        )
        for further in ("", "--optimizer-cpu-offload --optimizer-offload-fraction 0.5")
    )
    assert len(plain) == 5
    assert logged(aware) == plain
    assert logged(offloaded) == plain
    on_host = re.findall(r"of (\d+) weights (\d+) are updated on the host", offloaded)
    assert len(on_host) >= 4, "every rank says it"
    assert all(0 < int(some) < int(every) for every, some in on_host)

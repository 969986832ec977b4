"""The real pretrain_gpt.py of a Megatron-LM checkout, started as users start it, with both schedules."""

import json
import re
from pathlib import Path

import pytest
import torch

from integration_tests.pretraining import CHECKOUTS, logged, pretrain, validated, weights
from testing.megatron_optimizers import missing

pytestmark = pytest.mark.skipif(not CHECKOUTS, reason="MEGATRON_LM_CHECKOUT names no Megatron-LM checkout")

EMERGING = "megatron/core/optimizer/emerging_optimizers.py"  # which Megatron-LM's main has, and 0.16.1 has not


@pytest.fixture(params=CHECKOUTS, ids=lambda path: Path(path).name)
def checkout(request):
    return request.param


def test_with_a_learning_rate_of_0_the_log_is_the_stock_schedules(checkout):
    """Losses, learning rates, consumed samples, and validation in between; without our flag the script is stock."""
    still = "--lr 0 --min-lr 0 --train-iters 5 --eval-iters 2 --eval-interval 2 --clip-grad 0"
    paci, stock = (pretrain(checkout, schedule, 2, still) for schedule in ("paci", None))
    assert list(logged(paci)) == [1, 2, 3, 4, 5]
    assert len(validated(paci)) >= 2
    assert validated(paci) == validated(stock)
    assert {key: value[:3] for key, value in logged(paci).items()} == {
        key: value[:3] for key, value in logged(stock).items()
    }


def test_a_resumed_run_goes_on_bit_for_bit_and_stock_checkpoints_are_taken(checkout, tmp_path):
    common = (
        "--lr 1e-2 --min-lr 1e-3 --eval-iters 0 --eval-interval 100 --ckpt-format torch --save-interval 3 "
        "--paci-prediction every"
    )
    whole, resumed, stock = (str(tmp_path / name) for name in ("whole", "resumed", "stock"))
    straight = logged(pretrain(checkout, "paci", 2, common, "--train-iters 6 --save", whole))
    (tmp_path / "whole" / "latest_checkpointed_iteration.txt").write_text("3")
    second = logged(pretrain(checkout, "paci", 2, common, "--train-iters 6 --load", whole, "--save", resumed))
    assert list(second) == [4, 5, 6]
    for iteration, (consumed, rate, loss, norm) in second.items():
        expected = straight[iteration]
        assert (consumed, rate, norm) == (expected[0], expected[1], expected[3])
        # Megatron's first log line resets nothing, so the second one of a run shows the mean of two iterations.
        assert loss == expected[2] or iteration == 5
    for rank in range(2):
        ours, theirs = (weights(f"{folder}/iter_0000006/mp_rank_00_{rank:03}") for folder in (whole, resumed))
        assert len(ours) > 10
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # Where a rank's part of what is late is gone, all begin with nothing late, and say so.
    (tmp_path / "whole" / "latest_checkpointed_iteration.txt").write_text("3")
    [missing, *_] = sorted((tmp_path / "whole" / "iter_0000003" / "paci_schedule").iterdir())
    missing.unlink()
    gone = f"{missing.parent.name}/{missing.name} is missing"
    assert gone in pretrain(checkout, "paci", 2, common, "--train-iters 6 --load", whole, expect=1)
    (tmp_path / "whole" / "iter_0000003" / "paci_manifest.json").unlink()  # without which it is loaded as it is
    said = pretrain(checkout, "paci", 2, common, "--train-iters 6 --load", whole)
    assert "for 1 of the 2 ranks" in said
    assert logged(said)[4][2:] != straight[4][2:]
    # Where the stock schedule has written the checkpoint anew, what PACI left beside the old one is not of its weights.
    (tmp_path / "whole" / "latest_checkpointed_iteration.txt").write_text("3")
    pretrain(checkout, "1f1b", 2, common, "--train-iters 6 --load", whole, "--save", whole)
    said = pretrain(checkout, "paci", 2, common, "--train-iters 7 --override-opt-param-scheduler --load", whole)
    assert "for 2 of the 2 ranks of this topology, for 0 of them with the weights" in said
    # Both ways: the stock schedule goes on from ours, and ours from the stock's.
    longer = "--override-opt-param-scheduler"
    third = logged(pretrain(checkout, "1f1b", 2, common, longer, "--train-iters 9 --load", resumed, "--save", stock))
    fourth = logged(pretrain(checkout, "paci", 2, common, longer, "--train-iters 11 --load", stock))
    assert [line[0] for line in (*third.values(), *fourth.values())] == [str(3 * n) for n in range(7, 12)]


def test_the_first_updates_run_under_a_flush_and_a_resumed_run_counts_them(checkout, tmp_path):
    """Of the job, not of the run: until then it is stock, with its tied gradients and norms, and then it is not."""
    common = (
        "--lr 1e-2 --min-lr 1e-3 --eval-iters 0 --eval-interval 100 --ckpt-format torch --save-interval 2 "
        "--train-iters 6 --save"
    )
    warmup = "--paci-flush-warmup-steps 3"
    stock = logged(pretrain(checkout, "1f1b", 2, common, str(tmp_path / "stock")))
    straight = logged(pretrain(checkout, "paci", 2, warmup, common, str(tmp_path / "whole")))
    assert [straight[iteration] == stock[iteration] for iteration in range(1, 7)] == [True] * 3 + [False] * 3
    (tmp_path / "whole" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = logged(pretrain(checkout, "paci", 2, warmup, common, f"{tmp_path}/again --load {tmp_path}/whole"))
    assert {iteration: line[3] for iteration, line in resumed.items()} == {
        iteration: straight[iteration][3] for iteration in range(3, 7)
    }
    for rank in range(2):
        ours, theirs = (weights(f"{tmp_path}/{name}/iter_0000006/mp_rank_00_{rank:03}") for name in ("whole", "again"))
        assert len(ours) > 10
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_are_taken_without_the_optimizers_state(checkout, tmp_path):
    """With a learning rate of 0 they are those that the run began with."""
    still = "--lr 0 --min-lr 0 --clip-grad 0 --eval-iters 0 --eval-interval 100 --ckpt-format torch"
    whole = logged(pretrain(checkout, "paci", 2, still, "--train-iters 3 --save-interval 2 --save", str(tmp_path)))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    for flags, first, last in (("--finetune", 1, 2), ("--no-load-optim --no-load-rng", 3, 3)):
        some = logged(pretrain(checkout, "paci", 2, still, flags, f"--train-iters {last} --load {tmp_path}"))
        assert {key: value[:3] for key, value in some.items()} == {
            key: whole[key][:3] for key in range(first, last + 1)
        }


@pytest.mark.parametrize("stages", [2, 4])
def test_no_collective_of_a_steady_iteration_spans_stages(checkout, stages, tmp_path):
    """Of the whole iteration: train_step, optimizer, log line.  The recorder does see those of the stock schedule."""
    pretrain(
        checkout,
        "paci",
        stages,
        "--lr 1e-3 --train-iters 5 --eval-iters 0 --eval-interval 100",
        "--log-num-zeros-in-grad",
        trace=tmp_path / "paci",
    )
    for rank in range(stages):
        seen = json.loads((tmp_path / f"paci.{rank}").read_text())
        steady = [(name, ranks) for iteration, name, ranks in seen if iteration == 3]
        assert steady
        ends = [0, stages - 1]
        assert all(ranks in ([rank], ends) for _, ranks in steady), steady
        # Of the tied embedding: one sum, that nobody waits for.
        assert [ranks for _, ranks in steady].count(ends) == (rank in ends)
    if stages == 2:
        pretrain(
            checkout,
            "1f1b",
            stages,
            "--lr 1e-3 --train-iters 5 --eval-iters 0 --eval-interval 100",
            trace=tmp_path / "stock",
        )
        seen = json.loads((tmp_path / "stock.0").read_text())
        assert any(iteration == 3 and ranks == [0, 1] for iteration, _, ranks in seen)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("muon", ""),
        ("muon", "--optimizer dist_muon --bf16"),
        ("muon", "--use-distributed-optimizer --bf16"),
        ("adaptive_muon", "--use-distributed-optimizer --bf16"),
        ("lion", ""),
        ("soap", ""),
    ],
    ids=["muon", "dist_muon", "muon, sharded", "adaptive_muon, sharded", "lion", "soap"],
)
def test_no_collective_of_a_steady_iteration_with_another_optimizer_spans_stages(checkout, name, flags, tmp_path):
    """With two replicas, which share the weights out where the optimizer does so."""
    reason = missing(name, main := Path(checkout, EMERGING).is_file())
    if reason is None and not main and "--use-distributed-optimizer" in flags:
        reason = "0.16.1 refuses Muon with --use-distributed-optimizer"
    if reason is not None:
        pytest.skip(reason)
    said = pretrain(
        checkout,
        "paci",
        2,
        f"--optimizer {name}",
        flags,
        "--global-batch-size 4",
        "--lr 1e-3 --train-iters 5 --eval-iters 0 --eval-interval 100 --log-num-zeros-in-grad",
        trace=tmp_path / "paci",
        replicas=2,
    )
    assert list(logged(said)) == [1, 2, 3, 4, 5]
    for rank in range(4):
        seen = json.loads((tmp_path / f"paci.{rank}").read_text())
        steady = [ranks for iteration, _, ranks in seen if iteration == 3]
        stage, ends = {rank - rank % 2, rank - rank % 2 + 1}, [rank % 2, rank % 2 + 2]
        assert steady.count(sorted(stage)) > 0
        assert all(set(ranks) <= stage or ranks == ends for ranks in steady), steady
        assert steady.count(ends) == 1  # of the tied embedding, that nobody waits for


def test_what_cannot_run_is_refused_by_the_name_of_its_flag(checkout):
    flags = {
        "--rerun-mode": "validate_results",
        "--fp16": "",
        "--adlr-autoresume": "",
        "--empty-unused-memory-level": "1",
    }
    said = pretrain(
        checkout,
        "paci",
        2,
        "--lr 1e-3 --train-iters 2 --eval-iters 0 --eval-interval 100",
        *(f"{flag} {value}" for flag, value in flags.items()),
        expect=1,
    )
    listed = re.findall(r"^(--[\w-]+) \(", said, re.MULTILINE)
    assert set(flags) == set(listed)
    assert len(listed) == len(flags)  # once
    assert said.count("Traceback (most recent call last)") == 1  # torchrun's own


OWN_LOOP = """
from functools import partial
import torch
from gpt_builders import gpt_builder
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from megatron.training import arguments
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer
from model_provider import model_provider

if hasattr(arguments, "parse_and_validate_args"):  # later versions read the arguments before
    arguments.parse_and_validate_args()
initialize_megatron()
provider = partial(model_provider, gpt_builder)
kind = ModelType.encoder_or_decoder
[model], optimizer, _ = setup_model_and_optimizer(model_type=kind, model_provider_func=provider)
config = get_model_config(model)
config.grad_scale_func, config.finalize_model_grads_func = optimizer.scale_loss, finalize_model_grads

def mean(output):
    return output.mean(), {"loss": output.mean().item()}

def step(data, model):
    tokens = torch.randint(127, (1, 33), generator=torch.Generator().manual_seed(next(data)))
    mask = torch.ones(1, 1, 32, 32).triu(1).bool()
    return model(tokens[:, :-1], torch.arange(32)[None], mask, labels=tokens[:, 1:]), mean

data = iter(range(6 + 1))  # the first stage reads one ahead
for call in range(3):
    model.zero_grad_buffer()
    losses = get_forward_backward_func()(forward_step_func=step, data_iterator=data, model=[model], num_microbatches=2,
                                         seq_length=32, micro_batch_size=1, forward_only=False)
    optimizer.step()
    if losses:
        print("call", call, [each["loss"] for each in losses], flush=True)
"""


def test_a_loop_of_ones_own_on_initialize_megatron_trains(checkout, tmp_path):
    """Its calls are its own: the iterations that the arguments name are not counted in them."""
    script = tmp_path / "own.py"
    script.write_text(OWN_LOOP)
    still = "--lr 0 --min-lr 0 --train-iters 1 --eval-iters 0 --eval-interval 100 --save x --save-interval 1"
    still += " --rerun-mode disabled"  # the stock schedule can check gradients with re-runs in pretrain() only
    said = [pretrain(checkout, schedule, 2, still, script=script) for schedule in ("paci", "1f1b")]
    paci, stock = (re.findall(r"call \d .*", each) for each in said)
    assert len(paci) == 3
    assert paci == stock


def test_megatron_cores_own_example_trains_with_two_stages(checkout, tmp_path):
    """examples/run_simple_mcore_train_loop.py, with a pipeline of two stages.  Its Adam changes no weights."""
    example = Path(checkout, "examples", "run_simple_mcore_train_loop.py").read_text()
    text, saving, _ = example.partition("    # Saving the model\n")
    assert saving
    first = "pre_process=parallel_state.is_pipeline_first_stage()"
    for old, new in {
        "tensor_model_parallel_size=2, pipeline_model_parallel_size=1": "pipeline_model_parallel_size=2",
        "vocab_size=100,": f"vocab_size=100, {first}, post_process=parallel_state.is_pipeline_last_stage(),",
        "num_microbatches=1": "num_microbatches=2",
    }.items():
        assert old in text
        text = text.replace(old, new)
    script = tmp_path / "loop.py"
    script.write_text(text)
    paci, stock = (pretrain(checkout, schedule, 2, script=script) for schedule in ("paci", "1f1b"))
    assert 'runs the schedule "paci" on P = 2 stages, a = 2 micro-batches' in paci
    losses = re.findall(r"Iteration \d: Losses reduced: \[{.*}\]", paci)
    assert len(losses) == 5
    assert losses == re.findall(r"Iteration \d: Losses reduced: \[{.*}\]", stock)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--paci-clip=none", "argument --paci-clip"),
        ("--paci-prediction=evry", "argument --paci-prediction: 'evry'"),
        ("--paci-timeout=-3", "argument --paci-timeout: '-3': must be a finite number"),
        ("--paci-timeout=inf", "argument --paci-timeout: 'inf': must be a finite number"),
        ("--paci-flush-warmup-steps=-1", "argument --paci-flush-warmup-steps: '-1': must be a whole number"),
        ("--paci-flush-warmup-steps=1.5", "argument --paci-flush-warmup-steps: '1.5': must be a whole number"),
    ],
)
def test_a_wrong_value_of_a_flag_is_refused_by_the_name_of_the_flag(checkout, flag, said):
    assert said in pretrain(checkout, "paci", 1, flag, expect=1)


def test_an_unknown_schedule_is_refused_before_anything_starts(checkout):
    said = pretrain(checkout, "pacy", 1, "--lr 1e-3 --train-iters 1", expect=1)
    assert "did you mean 'paci'?" in said

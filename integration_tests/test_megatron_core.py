"""PACI on the real megatron-core: weights, losses and drift equal to a single process, to the last bit."""

import dataclasses
import gc
import math
import sys
import types

import pytest
import torch

from integration_tests.megatron_cpu import shim
from integration_tests.megatron_job import GptJob, refusals, train_all, train_recorded
from integration_tests.nccl_like import BACKEND as NCCL_LIKE
from integration_tests.ranks import backend, on_gpus, run_ranks
from paci_schedule import PipelineSpec, trace
from paci_schedule.adapters.frameworks import exists
from paci_schedule.core.drift import drift_bound, drift_of
from paci_schedule.core.schedules import paci

if not exists("megatron.core"):  # without an import, for which the CPU may have to play CUDA
    pytest.skip("megatron-core is not installed", allow_module_level=True)

from integration_tests.megatron_oracle import oracle_all

STOCK = pytest.mark.skipif(backend(2) == NCCL_LIKE, reason="stock groups its messages, which is not played")
EXACT = pytest.mark.skipif(on_gpus(1), reason="equality to the last bit is asked for on the CPU")


def world(job):
    return job.stages * job.data_parallel * job.tensor_parallel


def stage_ranks(job):
    """Global rank of replica 0, tensor rank 0, of each stage: Megatron numbers tensor, then data, then pipeline."""
    return [stage * job.data_parallel * job.tensor_parallel for stage in range(job.stages)]


def assert_equal(got, expected, what):
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.shape == expected[name].shape
        difference = (tensor.float() - expected[name].float()).abs().max().item()
        assert difference == 0.0, f"{what} {name}: {difference}"


def assert_as_the_oracle_says(jobs, oracle=oracle_all):
    """Returns what the ranks gave, by job."""
    ranks = run_ranks(train_all, world(jobs[0]), (jobs,))
    [expected] = run_ranks(oracle, 1, (jobs,))
    for number, job in enumerate(jobs):
        spec = PipelineSpec(stages=job.stages, accumulation=job.accumulation)
        count = job.calls * job.accumulation
        for stage, rank in enumerate(stage_ranks(job)):
            got, should = ranks[rank][number], expected[number][stage]
            assert_equal(got.weights, should.weights, f"{job}, stage {stage}, weight")
            # Shards of an optimizer, and stages under a flush, add up their squares in another order.
            reordered = (job.distributed_optimizer or job.layer_wise) and job.data_parallel > 1
            reordered |= job.stages > 2 and "flush_warmup_steps" in job.paci
            assert got.norms == (pytest.approx(should.norms, rel=1e-5) if reordered else should.norms)
            assert got.losses == (should.losses if stage == job.stages - 1 else [[]] * job.calls)
            drifts = should.stats["drifts"]
            assert got.stats["version"] == job.calls
            assert all(got.kept)
            assert got.stats["backwards"] == count == len(drifts)
            assert got.stats["drift_histogram"] == {drift: drifts.count(drift) for drift in set(drifts)}
            assert got.stats["max_drift"] <= got.stats["drift_bound"] == drift_bound(spec, stage)
            assert got.stats["peak_in_flight"] <= spec.in_flight(stage)
            if not {"drain_interval", "train_iters", "flush_warmup_steps"} & set(job.paci):
                assert drifts == [drift_of(spec, stage, index) for index in range(count)]
    return list(zip(*ranks, strict=True))


@EXACT
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_weights_losses_norms_and_drift_are_the_oracles(stages):
    assert_as_the_oracle_says([GptJob(stages=stages, accumulation=accumulation) for accumulation in (1, 2, 3, 4)])


@EXACT
def test_so_they_are_however_the_stage_computes():
    plain = GptJob(stages=2, accumulation=3, calls=4)
    assert_as_the_oracle_says(
        [
            dataclasses.replace(plain, **change)
            for change in (
                {"bf16": True},
                {"bf16": True, "distributed_optimizer": True},
                {"distributed_optimizer": True},
                {"recompute": "full"},
                {"recompute": "selective", "bf16": True},
                {"deallocate": False},
                {"clip_grad": 0.1},
                {"clip_grad": 0.1, "bf16": True, "paci": {"drain_interval": 2}},
                {"clip_grad": 0.1, "paci": {"clip": "stage"}},
                {"tied": True},
                {"optimizer": "sgd"},
                {"evaluate_after": (1, 3)},
                {"paci": {"early_receives": True}, "tied": True},
                {"paci": {"drain_interval": 2}},
            )
        ]
    )


@EXACT
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_so_they_are_with_tied_embeddings_and_global_clipping(stages):
    """And the two copies are one weight, to the bit, though no stage waits for the other's gradient."""
    plain = GptJob(stages=stages, calls=6, tied=True, clip_grad=0.2)
    jobs = [
        *(dataclasses.replace(plain, accumulation=accumulation) for accumulation in (1, 2, 3, 4)),
        dataclasses.replace(plain, tied=False, accumulation=3),
        dataclasses.replace(plain, bf16=True, distributed_optimizer=True, accumulation=1),
        dataclasses.replace(plain, paci={"drain_interval": 3}),
        dataclasses.replace(plain, paci={"train_iters": 6}, clip_grad=0.0),
    ]
    for job, ranks in zip(jobs, assert_as_the_oracle_says(jobs), strict=True):
        first, last = ranks[0].weights["embedding.word_embeddings.weight"], ranks[-1].weights["output_layer.weight"]
        assert torch.equal(first, last) == job.tied


@EXACT
@pytest.mark.parametrize("stages", [2, 4])
def test_so_they_are_where_the_first_end_comes_before_the_pipe_is_full(stages):
    """No stage waits for a gradient that needs a forward it has yet to do."""
    plain = GptJob(stages=stages, accumulation=1, clip_grad=0.2)
    assert_as_the_oracle_says(
        [
            dataclasses.replace(plain, calls=3, paci={"drain_interval": 1}),
            dataclasses.replace(plain, calls=stages - 1, paci={"train_iters": stages - 1}, tied=True),
        ]
    )


@EXACT
def test_so_they_are_with_data_parallel_replicas():
    plain = GptJob(stages=2, accumulation=3, calls=4, data_parallel=2)
    assert_as_the_oracle_says(
        [
            dataclasses.replace(plain, **change)
            for change in (
                {"clip_grad": 0.1},
                {"clip_grad": 0.1, "tied": True},
                {"tied": True, "distributed_optimizer": True},
                {"distributed_optimizer": True, "bf16": True},
                {"overlap_grad_reduce": True},
                {"overlap_grad_reduce": True, "align_grad_reduce": True, "distributed_optimizer": True},
            )
        ]
    )


@STOCK
@pytest.mark.parametrize(
    "job",
    [
        GptJob(stages=3, accumulation=2, calls=3, lr=0.0),
        GptJob(stages=2, accumulation=3, calls=3, lr=0.0, tensor_parallel=2),
        GptJob(stages=3, calls=4, accumulations=(2, 2, 3, 3), lr=0.0, paci={"drain_interval": 2}),
        GptJob(stages=3, calls=3, of_each_call=2, lr=0.0, paci={"drain_interval": 1}),
    ],
    ids=["pipeline", "tensor parallel", "another number of micro-batches", "an iterator for each call"],
)
def test_with_a_learning_rate_of_0_losses_and_gradients_are_the_stock_schedules(job):
    stock = dataclasses.replace(job, schedule="1f1b")
    for late, flushed in run_ranks(train_all, world(job), ([job, stock],)):
        assert late.losses == flushed.losses
        accumulations = job.accumulations or (job.accumulation,) * job.calls
        assert [len(losses) for losses in late.losses] in ([0] * job.calls, [*accumulations])
        for number in range(job.calls):
            assert any(gradient.abs().max() > 0 for gradient in late.gradients[number].values())
            assert_equal(late.gradients[number], flushed.gradients[number], f"call {number}, gradient of")


def test_with_tensor_parallel_stages_training_goes_the_same_way_on_all_their_ranks():
    plain = GptJob(stages=2, accumulation=2, calls=4, tensor_parallel=2, clip_grad=0.5)
    late = {"tied": True, "bf16": True}
    jobs = [
        plain,
        dataclasses.replace(plain, **late),
        dataclasses.replace(plain, **late, distributed_optimizer=True, evaluate_after=(2,)),
    ]
    for job, ranks in zip(jobs, zip(*run_ranks(train_all, world(plain), (jobs,)), strict=True), strict=True):
        for one, other in (ranks[:2], ranks[2:]):
            assert one.norms == other.norms
            assert one.losses == other.losses
            assert one.stats["max_drift"] == other.stats["max_drift"]
            for name in one.weights:
                if "norm" in name:
                    assert torch.equal(one.weights[name], other.weights[name])
        for first, last in zip(ranks[:2], ranks[2:], strict=True):
            same = torch.equal(first.weights["embedding.word_embeddings.weight"], last.weights["output_layer.weight"])
            assert same == job.tied


def test_zeros_are_the_stages_own_and_counting_them_leaves_the_norms_alone():
    plain = GptJob(clip_grad=0.2, tied=True)
    for silent, counted in run_ranks(train_all, 2, ([plain, dataclasses.replace(plain, count_zeros=True)],)):
        assert silent.zeros == [None] * plain.calls
        # The embedding of the last stage is shared: its zeros count at the first stage alone.
        owned = [
            {name: gradient for name, gradient in call.items() if "output_layer" not in name}
            for call in counted.gradients
        ]
        assert counted.zeros == [sum(int((g == 0).sum()) for g in call.values()) for call in owned]
        assert counted.norms == silent.norms
        assert_equal(counted.weights, silent.weights, "weight")


def test_another_number_of_micro_batches_is_taken_where_the_pipe_is_empty_alone():
    """And with tied embeddings, sums that a smaller number made wait are applied, by both copies alike."""
    tied = GptJob(
        stages=3, tied=True, clip_grad=0.2, calls=6, accumulations=(1, 1, 2, 2, 1, 1), paci={"drain_interval": 2}
    )
    first, _, last = [trained for [trained] in run_ranks(train_all, 3, ([tied],))]
    assert torch.equal(first.weights["embedding.word_embeddings.weight"], last.weights["output_layer.weight"])
    parked = dataclasses.replace(tied, tied=False, paci={"drain_interval": 3})
    [said], *_ = run_ranks(refusals, 3, ([parked],))
    assert "num_microbatches=2 after 1, with 1 micro-batches in flight" in said
    assert "drain_interval" in said


SWITCHED = ("paci", "paci", "1f1b", "1f1b", "paci", "paci")


@STOCK
@pytest.mark.parametrize(
    "change", [{}, {"data_parallel": 2, "distributed_optimizer": True}], ids=["pipeline", "sharded optimizer"]
)
def test_a_call_of_the_stock_schedule_in_between_is_stock_where_the_pipe_is_empty(change):
    """Gradients, norms and zeros, with a learning rate of 0; and PACI goes on with the norms of the stock calls."""
    job = GptJob(
        calls=6, lr=0.0, clip_grad=0.2, schedules=SWITCHED, count_zeros=True, paci={"drain_interval": 2}, **change
    )
    by_stage = dataclasses.replace(job, paci={**job.paci, "clip": "stage"})
    stock = dataclasses.replace(job, schedules=(), schedule="1f1b")
    ranks = run_ranks(train_all, world(job), ([job, by_stage, stock],))
    for *switched, stock in ranks:
        for trained in switched:
            assert trained.losses == stock.losses
            for call, schedule in enumerate(SWITCHED):
                if schedule == "1f1b":
                    assert trained.norms[call] == stock.norms[call]
                    assert trained.zeros[call] == stock.zeros[call]
                if not job.distributed_optimizer:  # whose buffers hold a rank's own part alone
                    assert_equal(trained.gradients[call], stock.gradients[call], f"call {call}, gradient of")
    if not job.distributed_optimizer:
        squares = [
            [sum(float(gradient.square().sum()) for gradient in call.values()) for call in trained.gradients]
            for trained, *_ in ranks
        ]
        for stage, (trained, *_) in enumerate(ranks):
            assert trained.norms[4] == pytest.approx((squares[stage][4] + squares[1 - stage][3]) ** 0.5, rel=1e-5)


@STOCK
def test_tied_gradients_that_wait_are_applied_by_the_first_stock_call():
    job = GptJob(stages=3, accumulation=1, calls=6, lr=0.0, tied=True, schedules=SWITCHED, paci={"drain_interval": 2})
    first, _, last = run_ranks(train_all, 3, ([job, dataclasses.replace(job, schedules=(), schedule="1f1b")],))
    for (trained, stock), name in ((first, "embedding.word_embeddings.weight"), (last, "output_layer.weight")):
        got, should = ([call[f"module.{name}"] for call in each.gradients] for each in (trained, stock))
        assert [bool(gradient.any()) for gradient in got] == [False, False, True, True, False, False]
        assert torch.equal(got[3], should[3])
        torch.testing.assert_close(sum(got[:3]), sum(should[:3]))


def test_what_would_mix_up_parked_micro_batches_is_refused():
    """Another schedule, on every rank, also where the stage itself has none parked; and another data iterator."""
    switched = GptJob(stages=3, calls=2, schedules=("paci", "1f1b"))
    fed = GptJob(stages=3, calls=2, of_each_call=4)
    first, middle, last = run_ranks(refusals, 3, ([switched, fed],))
    assert first == middle == last
    assert "'1f1b' after 'paci', with 2 micro-batches in flight" in first[0]
    assert "another data_iterator than in the call before, with 2 micro-batches in flight" in first[1]
    assert all("{'drain_interval': n}" in said for said in first)


def models_left(jobs):
    """How many models are still there after each of several jobs in one process."""
    from megatron.core.models.gpt import GPTModel

    left = []
    for job in jobs:
        train_all([job])
        gc.collect()
        left.append(sum(isinstance(each, GPTModel) for each in gc.get_objects()))
    return left


@STOCK
def test_a_model_is_freed_when_its_training_is_over():
    """Once its pipe is empty: what is parked holds the graph, and the graph the model."""
    ended = GptJob(tied=True, clip_grad=1.0, paci={"train_iters": 5, "prediction": "every"})
    for left in run_ranks(models_left, 2, ([GptJob(schedule="1f1b"), ended, ended],)):
        assert left == [0, 0, 0]


@pytest.mark.parametrize("change", [{}, {"tied": True}, {"tied": True, "bf16": True}])
def test_a_resumed_run_goes_on_bit_for_bit(change):
    """With what is late by design: norms, and sums of tied gradients that wait to be applied."""
    job = GptJob(stages=3, accumulation=1, calls=8, clip_grad=0.2, paci={"drain_interval": 4}, **change)
    for straight, resumed in run_ranks(train_all, 3, ([job, dataclasses.replace(job, resume_after=4)],)):
        assert_equal(resumed.weights, straight.weights, "weight")
        assert resumed.norms == straight.norms


def test_a_state_that_would_lose_micro_batches_is_refused():
    first, last = run_ranks(refusals, 2, ([GptJob(calls=3, resume_after=2)],))
    assert first == last
    assert "1 micro-batches in flight" in first[0]
    assert "drain_interval" in first[0]


def test_an_evaluation_changes_nothing_and_sees_the_weights_of_all_stages_at_one_version():
    plain = GptJob(stages=2, accumulation=2, calls=4)
    jobs = [
        plain,
        dataclasses.replace(plain, evaluate_after=(2, 3)),
        dataclasses.replace(plain, calls=2, paci={"train_iters": 2}, evaluate_after=(2,)),
    ]
    ranks = run_ranks(train_all, 2, (jobs,))
    for without, evaluated, _ in ranks:
        assert_equal(evaluated.weights, without.weights, "weight")
    _, evaluated, ended = ranks[-1]
    assert [len(losses) for losses in evaluated.evaluations] == [2, 2]
    assert evaluated.evaluations[0] == ended.evaluations[0]
    assert evaluated.evaluations[0] != evaluated.evaluations[1]


@STOCK
@pytest.mark.parametrize("change", [{}, {"distributed_optimizer": True}, {"overlap_grad_reduce": True}])
def test_no_collective_of_a_steady_call_spans_stages(change):
    """Each is of one stage's replicas; the recorder does see those of the stock schedule that span stages."""
    job = GptJob(data_parallel=2, calls=3, clip_grad=1.0, **change)
    stages = [{0, 1}, {2, 3}]
    for stage, trained in zip([0, 0, 1, 1], run_ranks(train_recorded, 4, (job,)), strict=True):
        assert trained.collectives
        assert all(set(ranks) <= stages[stage] for _, ranks in trained.collectives), trained.collectives
    if not change:
        tied = run_ranks(train_recorded, 4, (dataclasses.replace(job, tied=True),))
        for trained, ends in zip(tied, [(0, 2), (1, 3), (0, 2), (1, 3)], strict=True):
            spanning = [ranks for _, ranks in trained.collectives if not any(set(ranks) <= stage for stage in stages)]
            assert spanning == [ends]  # of the embedding, which nobody waits for
        stock = run_ranks(train_recorded, 4, (dataclasses.replace(job, schedule="1f1b"),))
        assert all(
            ("allreduce", ranks) in trained.collectives
            for trained, ranks in zip(stock, [(0, 2), (1, 3), (0, 2), (1, 3)], strict=True)
        )


def test_every_stage_knows_the_loss_of_the_last_call():
    job = GptJob(stages=3, accumulation=4, calls=2)
    ranks = [trained for [trained] in run_ranks(train_all, 3, ([job],))]
    expected = sum(ranks[-1].losses[-1]) / 4
    assert [trained.stats["loss"] for trained in ranks] == pytest.approx([expected] * 3, rel=1e-6)


def test_a_recorded_run_is_what_paci_trace_reads(tmp_path):
    job = GptJob(stages=3, accumulation=2, calls=4, paci={"train_iters": 4, "record": str(tmp_path)})
    run_ranks(train_all, 3, ([job],))
    recordings = trace.merge([trace.read(path) for path in sorted(tmp_path.iterdir())])
    spec = PipelineSpec(stages=3, accumulation=2)
    for stage, recording in enumerate(recordings):
        assert recording.stage == stage
        done = [str(span.op) for span in trace.timeline(recordings).rows[stage]]
        assert done == [str(op) for op in paci.stream(spec, stage, 4)]


REFUSED = {
    "--calculate-per-token-loss": {"changes": {"calculate_per_token_loss": True}},
    "--variable-seq-lengths": {"changes": {"variable_seq_lengths": True}},
    "--cuda-graph-impl": {"changes": {"cuda_graph_impl": "local"}},
    "--num-experts": {"changes": {"num_moe_experts": 4}},
    "--context-parallel-size": {"changes": {"context_parallel_size": 2}},
    "--num-layers-per-virtual-pipeline-stage": {"changes": {"virtual_pipeline_model_parallel_size": 2}},
    "--fp8-format": {"changes": {"fp8": "e4m3"}},
    "--fp16": {"changes": {"fp16": True}},
    "--overlap-param-gather": {"changes": {"overlap_param_gather": True}},
    "--defer-embedding-wgrad-compute": {"changes": {"defer_embedding_wgrad_compute": True}},
    "--mtp-num-layers": {"changes": {"mtp_num_layers": 1}},
    "--untie-embeddings-and-output-weights": {"tied": True, "clip_grad": 1.0, "paci": {"clip": "stage"}},
    "must be one of 'global', 'stage'": {"paci": {"clip": "none"}},
    "'prediction': 'evry'}: must be 'off', 'window'": {"paci": {"prediction": "evry"}},
    "'prediction_reach': 1.5}: has no effect without a prediction": {"paci": {"prediction_reach": 1.5}},
    "must be true or false": {"paci": {"early_receives": 1}},
    "must be a whole number of updates of at least 0": {"paci": {"flush_warmup_steps": -1}},
    "'flush_warmup_steps': True": {"paci": {"flush_warmup_steps": True}},
    "no end is known": {"paci": {"record": "runs"}},
    "did you mean 'paci'?": {"schedule": "paki"},
    "did you mean 'timeout'?": {"paci": {"timeot": 3}},
    "'timeout': inf": {"paci": {"timeout": math.inf}},
    "'timeout': 1e+20": {"paci": {"timeout": 1e20}},
    "'timeout': True": {"paci": {"timeout": True}},
    "'drain_interval': 1.5": {"paci": {"drain_interval": 1.5}},
    "config.paci = {'train_iters': n}": {"calls": 4, "missing": 5, "paci": {"timeout": 8}},
}


@STOCK
def test_what_cannot_run_is_refused_on_every_rank_with_the_name_of_the_flag():
    """Before the first micro-batch; and data that ends while the first stage reads ahead is said so."""
    first, last = run_ranks(refusals, 2, ([GptJob(**{"calls": 1, **change}) for change in REFUSED.values()],))
    for flag, said, echoed in zip(REFUSED, first, last, strict=True):
        assert flag in said
        if "train_iters" in flag:
            assert said.startswith("DataEndedError")
            assert echoed.startswith("LinkError")
        else:
            assert said == echoed
            assert said.startswith(("UnsupportedError", "ConfigError"))


def test_a_pipeline_of_one_stage_is_the_stock_schedule():
    job = GptJob(stages=1, accumulation=3, calls=3)
    [[paci, stock]] = run_ranks(train_all, 1, ([job, dataclasses.replace(job, schedule="1f1b")],))
    assert_equal(paci.weights, stock.weights, "weight")
    assert paci.losses == stock.losses


def register_late(alias):
    """What registration says when a training loop has imported the selector by name."""
    shim.install()
    import megatron.core.pipeline_parallel

    import paci_schedule

    loop = types.ModuleType("a_training_loop")
    setattr(loop, alias, megatron.core.pipeline_parallel.get_forward_backward_func)
    sys.modules[loop.__name__] = loop
    try:
        paci_schedule.register()
    except paci_schedule.UnsupportedError as error:
        return str(error)


@pytest.mark.parametrize("alias", ["get_forward_backward_func", "gfb"])
def test_a_selector_that_was_imported_before_registration_is_said_so(alias):
    [said] = run_ranks(register_late, 1, (alias,))
    assert f"a_training_loop (as {alias}) imported get_forward_backward_func before paci_schedule was reg" in said


def train_initialized(jobs):
    """As `train_all`, where Megatron-LM's initialize_megatron has run, but not its training loop."""
    args = types.SimpleNamespace(train_iters=2, save="somewhere", save_interval=1, exit_interval=None)
    sys.modules["megatron.training.global_vars"] = types.SimpleNamespace(_GLOBAL_ARGS=args)
    return train_all(jobs)


def test_a_loop_of_ones_own_on_megatron_lms_arguments_counts_its_own_calls():
    job = GptJob(calls=4, paci={"drain_interval": 3})
    for [plain], [initialized] in zip(
        *(run_ranks(each, 2, ([job],)) for each in (train_all, train_initialized)), strict=True
    ):
        assert_equal(initialized.weights, plain.weights, "weight")
        assert initialized.parked == plain.parked


def call_stock(schedule):
    """What a call of the selector's function gives where Megatron-core has no process groups yet."""
    shim.install()
    from paci_schedule.adapters.megatron.dispatch import Selector

    model = torch.nn.Module()
    model.config = types.SimpleNamespace(pipeline_schedule=schedule)
    return Selector(lambda: lambda **call: sorted(call))()(model=model, num_microbatches=2)


def test_the_stock_schedule_is_handed_the_call_and_nothing_else_is_looked_at():
    for schedule in (None, "1f1b"):
        assert run_ranks(call_stock, 1, (schedule,)) == [["forward_only", "model", "num_microbatches"]]

"""Calls of the schedule on the real megatron-core: what they report, what they refuse, and whose loops may call."""

import dataclasses
import functools
import math
import sys
import types

import pytest
import torch

from integration_tests.megatron_checks import STOCK, assert_equal
from paci_schedule import PipelineSpec, trace
from paci_schedule.adapters.frameworks import exists
from paci_schedule.core.schedules import paci
from paci_schedule.errors import UnsupportedError
from testing.megatron_cpu import shim
from testing.megatron_job import refusals, train_all
from testing.megatron_model import GptJob
from testing.ranks import gather_outcomes, run_ranks

if not exists("megatron.core"):  # without an import, for which the CPU may have to play CUDA
    pytest.skip("megatron-core is not installed", allow_module_level=True)


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
    "--cuda-graph-impl": {"changes": {"cuda_graph_impl": "local"}},
    "virtual pipeline stages": {"changes": {"virtual_pipeline_model_parallel_size": 2}},
    "--fp8-format": {"changes": {"fp8": "e4m3"}},
    "--fp16": {"changes": {"fp16": True}},
    "--defer-embedding-wgrad-compute": {"changes": {"defer_embedding_wgrad_compute": True}},
    "--overlap-moe-expert-parallel-comm": {"changes": {"overlap_moe_expert_parallel_comm": True}},
    "set config.finalize_model_grads_func": {"tied": True, "changes": {"finalize_model_grads_func": None}},
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


def told(outcome):
    """What our lines in a rank's output say, without the version."""
    assert outcome.ended == "returned", outcome.error
    return [line.partition(": ")[2] for line in outcome.output.splitlines() if line.startswith("paci_schedule ")]


def test_a_pipeline_of_one_stage_is_the_stock_schedule_and_says_so_once():
    job = GptJob(stages=1, accumulation=3, calls=3)
    [outcome] = gather_outcomes(train_all, 1, ([job, dataclasses.replace(job, schedule="1f1b")],))
    [line] = told(outcome)
    assert line.startswith('Megatron-core runs the schedule "paci" on P = 1 stage, a = 3 micro-batches an update; one')
    paci, stock = outcome.value
    assert_equal(paci.weights, stock.weights, "weight")
    assert paci.losses == stock.losses


def test_rank_0_says_in_one_line_what_runs():
    job = GptJob(stages=2, accumulation=1, calls=1, clip_grad=0.5, paci={"prediction": "every"})
    first, last = gather_outcomes(train_all, 2, ([job, dataclasses.replace(job, schedule="1f1b")],))
    [line] = told(first)
    assert line.startswith(
        'Megatron-core runs the schedule "paci" on P = 2 stages, a = 1 micro-batch an update; drift at most 1 update; '
        "the global norm is clipped to 0.5, with norms of other stages that are up to 2 updates old; stale forwards "
        "run on predicted weights ('every'), which costs stage 0 a copy of its weights, "
    )
    assert told(last) == []


def register_late(alias):
    """What a training loop that has imported a schedule by name calls then, what the selector returns, and the log; and
    what is said where something keeps the schedule without a name."""
    shim.install()
    from megatron.core.pipeline_parallel import get_forward_backward_func, schedules

    import paci_schedule
    from paci_schedule.adapters.megatron import dispatch

    stock = schedules.forward_backward_pipelining_without_interleaving
    loop = types.ModuleType("a_training_loop")
    setattr(loop, alias, stock)
    sys.modules[loop.__name__] = loop
    logged = []
    dispatch.logger.warning = lambda text, *values: logged.append(text % values)
    loop.TABLE = {"1f1b": stock}
    with pytest.raises(UnsupportedError) as refused:
        paci_schedule.register("megatron")
    untouched = schedules.forward_backward_pipelining_without_interleaving is stock
    del loop.TABLE
    paci_schedule.register("megatron")
    paci_schedule.register("megatron")
    ours = schedules.forward_backward_pipelining_without_interleaving
    chosen = get_forward_backward_func(pp_size=2, vp_size=None)
    replaced = ours is not stock, getattr(loop, alias) is ours, chosen is ours
    return *replaced, untouched, str(refused.value), logged


@pytest.mark.parametrize("alias", ["forward_backward_pipelining_without_interleaving", "schedule"])
def test_a_schedule_imported_before_registration_is_replaced(alias):
    """And the selector, whoever has it, returns the function of that name, as Megatron-core's own tests ask for."""
    [(*replaced, refused, [said])] = run_ranks(register_late, 1, (alias,))
    assert replaced == [True] * 4
    assert refused.startswith(
        "a_training_loop.TABLE: got a schedule of Megatron-core before paci_schedule was registered"
    )
    assert f"a_training_loop (as {alias}) imported a schedule of Megatron-core before" in said


def refusals_of_bridge(jobs):
    """As `refusals`, called by a training loop of Megatron-Bridge that is not `train`, with messages and groups of its
    own."""
    shim.install()
    from paci_schedule.adapters.megatron.dispatch import Dispatcher

    own = {"p2p_communicator": object(), "pg_collection": types.SimpleNamespace()}
    Dispatcher.forward_backward = functools.partialmethod(Dispatcher.forward_backward, **own)
    loop = types.ModuleType("megatron.bridge.training.train_megatron_mimo")
    exec("def train_step(call, jobs):\n    return call(jobs)", vars(loop))
    return loop.train_step(refusals, jobs)


@STOCK
def test_what_only_a_job_can_tell_is_refused_by_name():
    for said in run_ranks(refusals_of_bridge, 2, ([GptJob(calls=1)],)):
        assert "megatron.bridge.training.train_megatron_mimo.train_step: not tried yet; it sums over all" in said[0]
        assert "a p2p_communicator of your own" in said[0]
        assert "a pg_collection with groups of its own" in said[0]


def train_initialized(jobs):
    """Train where Megatron-LM's initialize_megatron has run, but not its training loop; else as `train_all`."""
    args = types.SimpleNamespace(train_iters=2, save="somewhere", save_interval=1, exit_interval=None)
    sys.modules["megatron.training.global_vars"] = types.SimpleNamespace(_GLOBAL_ARGS=args)
    return train_all(jobs)


def test_a_training_loop_of_ones_own_counts_its_own_calls():
    job = GptJob(calls=4, paci={"drain_interval": 3})
    for [plain], [initialized] in zip(
        *(run_ranks(each, 2, ([job],)) for each in (train_all, train_initialized)), strict=True
    ):
        assert_equal(initialized.weights, plain.weights, "weight")
        assert initialized.parked == plain.parked


def call_stock(schedule):
    """What a call of a schedule gives where Megatron-core has no process groups yet."""
    shim.install()
    from paci_schedule.adapters.megatron.dispatch import Dispatcher

    model = torch.nn.Module()
    model.config = types.SimpleNamespace(pipeline_schedule=schedule)
    return Dispatcher().in_place_of(lambda **call: sorted(call))(model=model, num_microbatches=2)


def test_a_stock_call_is_passed_on_unchanged():
    for schedule in (None, "1f1b"):
        assert run_ranks(call_stock, 1, (schedule,)) == [["forward_only", "model", "num_microbatches"]]

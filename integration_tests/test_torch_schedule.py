"""`SchedulePaci` beside what surrounds a schedule: replicas, checkpoints, evaluation, errors, collectives, names."""

import copy
import dataclasses
import math
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, schedules
from torch.nn.parallel import DistributedDataParallel

from paci_schedule.errors import ConfigError, LinkError, UnsupportedError
from paci_schedule.rehearse import rehearse
from testing import deepspeed_job, jobs, ranks, torch_job
from testing.collectives import recorded
from testing.jobs import Job
from testing.reference.deepspeed import Reference

REPLICATED = Job(
    stages=2,
    accumulation=3,
    script=("train x3", "drain", "train x3"),
    optimizer="sgd",
    config={"paci": {"on_nonfinite": "skip"}},  # nothing is left out, but all shards are asked
)


def ddp(module, group):
    return DistributedDataParallel(module, process_group=group)


def fsdp(module, group):
    return fully_shard(module, mesh=DeviceMesh.from_group(group, "cpu"), reshard_after_forward=False)


@pytest.mark.parametrize(("wrap", "clip"), [(ddp, 0.4), (fsdp, 0.0), (fsdp, 0.4)])
def test_replicas_of_a_stage_train_as_the_reference(wrap, clip):
    job = dataclasses.replace(REPLICATED, clip=clip)
    [results] = torch_job.run_all((job, {"wrap": wrap}), replicas=2)
    expected = Reference(job, replicas=2).run()
    for replica in (results[:2], results[2:]):
        for stage, result in enumerate(replica):
            for moment, truth in zip(result["moments"], expected, strict=True):
                moment["loss"] = truth.loss[stage]  # the schedule's is the replica's own
        # The norm over shards is added up in another order.
        deepspeed_job.assert_equal(replica, expected, rounding=1e-6 if wrap is fsdp and clip else 0.0)


# ---- against the rehearsal -------------------------------------------------------------------------------------------


def model(stages, dtype):
    torch.manual_seed(3)
    return [
        torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6)).to(dtype)
        for _ in range(stages)
    ]


def batch(number, accumulation, dtype):
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(4 * accumulation, 6, generator=generator).to(dtype) for _ in range(2)]


def loss_fn(output, target):
    return torch.nn.functional.mse_loss(output.float(), target.float())


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.01)


def built(module, stages, accumulation, **options):
    from paci_schedule.adapters.torch import SchedulePaci

    stage = PipelineStage(module, dist.get_rank(), stages, torch.device("cpu"))
    return SchedulePaci(stage, accumulation, loss_fn, **{"optimizers": adamw(module), **options})


def trained(stages, accumulation, dtype, batches, options):
    module = model(stages, dtype)[dist.get_rank()]
    schedule = built(module, stages, accumulation, **options)
    last = dist.get_rank() == stages - 1
    for number in range(batches):
        inputs, target = batch(number, accumulation, dtype)
        schedule.step(*([inputs] if dist.get_rank() == 0 else []), target=target if last else None)
    schedule.drain()
    return [weight.detach().clone() for weight in module.parameters()]


def rehearsed(stages, accumulation, dtype, batches, options):
    """The weights of every stage after a rehearsal."""
    modules = model(stages, dtype)
    pairs = ([each.chunk(accumulation) for each in batch(number, accumulation, dtype)] for number in range(batches))
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    arguments["clip"] = arguments.pop("max_norm", 0.0)
    for _ in rehearse(
        modules,
        [adamw(module) for module in modules],
        loss_fn,
        (list(zip(*pair, strict=True)) for pair in pairs),
        accumulation=accumulation,
        **arguments,
    ):
        pass
    return [list(module.parameters()) for module in modules]


def all_trained(jobs):
    return [trained(*job) for job in jobs]


PREDICTED = {"max_norm": 0.05, "prediction": "every", "prediction_reach": 1.5}


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_rehearsal_trains_the_same_weights(stages):
    window = {"max_norm": 0.05, "prediction": "window", "extra_in_flight": [1] * (stages - 1)}
    jobs = [(stages, accumulation, torch.bfloat16, 5, {}) for accumulation in range(1, 9)]
    jobs += [(stages, 4, torch.bfloat16, 5, PREDICTED), (stages, 4, torch.float32, 5, window)]
    results = ranks.run_ranks(all_trained, stages, (jobs,))
    for number, job in enumerate(jobs):
        for expected, found in zip(rehearsed(*job), results, strict=True):
            assert all(torch.equal(*pair) for pair in zip(expected, found[number], strict=True)), job


# ---- checkpoints -----------------------------------------------------------------------------------------------------

SAVED = Job(
    stages=3,
    accumulation=2,
    script=("train x4", "drain"),
    model="tied",
    clip=0.4,
    config={"paci": {"loss_spike": 9.0}},
)


def interrupted(folder):
    """Weights after 4 batches, a checkpoint and 3 more; and after the last 3 from the checkpoint."""
    found = []
    for resumes in (False, True):
        schedule, weights = torch_job.build(SAVED)
        optimizer = schedule._update._optimizers[0]
        module = schedule._stage.submod
        feed = jobs.data(SAVED.model)
        if not resumes:
            steps(schedule, feed, 4)
            with pytest.raises(ConfigError, match=r"call schedule\.drain\(\) on every rank"):
                schedule.state_dict()
            schedule.drain()
            dcp.save(state(schedule, module, optimizer), checkpoint_id=folder)
        else:
            for weight in module.parameters():  # AdamW has a state to load into only after a step
                weight.grad = torch.zeros_like(weight)
            optimizer.step()
            optimizer.zero_grad()
            loaded = state(schedule, module, optimizer)
            dcp.load(loaded, checkpoint_id=folder)
            mine = loaded[f"rank_{dist.get_rank()}"]
            module.load_state_dict(mine["module"])
            optimizer.load_state_dict(mine["optimizer"])
            schedule.load_state_dict(loaded["schedule"])
            for _ in range(4 * SAVED.accumulation):
                next(feed)
        steps(schedule, feed, 3)
        schedule.drain()
        found.append(({name: weight.detach().clone() for name, weight in weights.items()}, schedule.stats()["version"]))
    return found


def state(schedule, module, optimizer):
    mine = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
    return {f"rank_{dist.get_rank()}": mine, "schedule": schedule.state_dict()}


def steps(schedule, feed, count):
    for _ in range(count):
        args, target = torch_job.whole_batch([next(feed) for _ in range(SAVED.accumulation)])
        first, last = schedule._stage.is_first, schedule._stage.is_last
        schedule.step(*(args if first else ()), target=target if last else None)


def test_a_checkpoint_of_torch_distributed_goes_on_as_the_job_that_saved_it(tmp_path):
    for whole, resumed in ranks.run_ranks(interrupted, SAVED.stages, (str(tmp_path),)):
        assert whole[1] == resumed[1] == 7
        assert all(torch.equal(whole[0][name], resumed[0][name]) for name in whole[0])


# ---- what is refused, and what is counted ----------------------------------------------------------------------------


def refused():
    """The messages of errors that all ranks get before training starts."""
    from paci_schedule.adapters.torch import SchedulePaci

    module = model(2, torch.float32)[dist.get_rank()]
    stage = PipelineStage(module, dist.get_rank(), 2, torch.device("cpu"))
    found = {}

    def note(name, kind, call):
        with pytest.raises(kind) as error:
            call()
        found[name] = str(error.value)

    note("option", ConfigError, lambda: SchedulePaci(stage, 2, loss_fn, predictions="every"))
    note("value", ConfigError, lambda: SchedulePaci(stage, 2, loss_fn, prediction="often"))
    note("micro-batches", ConfigError, lambda: SchedulePaci(stage, 0, loss_fn))
    note("loss", ConfigError, lambda: SchedulePaci(stage, 2))
    note("norm", ConfigError, lambda: built(module, 2, 2, max_norm=-1))
    rprop = torch.optim.Rprop(module.parameters())
    note("optimizer", UnsupportedError, lambda: built(module, 2, 2, optimizers=rprop, prediction="every"))
    tied = {"words": module[0].weight} if dist.get_rank() else {}
    note("one copy", ConfigError, lambda: built(module, 2, 2, tied=tied))
    four = PipelineStage(module, dist.get_rank(), 4, torch.device("cpu"))
    note("chunks", UnsupportedError, lambda: SchedulePaci(four, 2, loss_fn))
    without = SchedulePaci(stage, 2, loss_fn)
    note("no optimizer", ConfigError, lambda: without.step(torch.ones(4, 6)))
    schedule = built(module, 2, 2)
    note("twice", ConfigError, lambda: schedule.set_optimizers(adamw(module)))
    note("schedule", ConfigError, lambda: schedule.set_pipeline_schedule("pacy"))
    note("state", ConfigError, lambda: schedule.load_state_dict({"stage_7": {}}))
    if dist.get_rank():
        note("target", ConfigError, schedule.step)
    return found


def test_bad_input_is_refused_before_training_starts():
    first, last = ranks.run_ranks(refused, 2)
    assert all(first[name] == last[name] for name in first if name != "state")  # which names the stage
    says = {
        "option": "SchedulePaci(predictions=...): unknown option; valid are 'clip'",
        "value": "prediction",
        "micro-batches": "accumulation=0: must be a whole number of at least 1",
        "loss": "give the loss function",
        "norm": "max_norm=-1: must be a number of at least 0",
        "optimizer": "SchedulePaci(prediction='every') with",
        "one copy": "stages [1] give a copy",
        "chunks": "PACI has one stage a rank",
        "no optimizer": "give SchedulePaci(optimizers=...)",
        "twice": "give them once",
        "schedule": "did you mean 'paci'",
        "state": "no 'stage_0' among ['stage_7']",
        "target": "step() without target= on the last stage",
    }
    for name, part in says.items():
        text = last.get(name, "") if name == "target" else first[name]
        assert part in text, f"{name}: {text}"


def steady_collectives():
    schedule, _ = torch_job.build(Job(stages=3, accumulation=2, script=(), clip=0.4))
    feed, seen = jobs.data("words"), []
    steps(schedule, feed, 3)
    with recorded(lambda name, members: seen.append((name, members))):
        steps(schedule, feed, 4)
    return [call for call in seen if len(call[1]) > 1]


def test_no_collective_spans_stages_in_steady_state():
    assert ranks.run_ranks(steady_collectives, 3) == [[], [], []]


ENDS = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, os.getcwd())
dist.init_process_group("gloo")
from integration_tests import test_torch_schedule as job
module = job.model(2, torch.float32)[dist.get_rank()]

def main():
    schedule = job.built(module, 2, 2)
    for number in range(3):
        inputs, target = job.batch(number, 2, torch.float32)
        schedule.step(*([inputs] if dist.get_rank() == 0 else []), target=target if dist.get_rank() else None)

import atexit
atexit.register(lambda: torch.save(module.state_dict(), f"{sys.argv[1]}/{dist.get_rank()}"))
main()
"""


def test_a_script_that_just_ends_has_applied_its_last_update(tmp_path):
    """Handlers run in the opposite order: the schedule's, registered last, drains before the weights are saved."""
    script = tmp_path / "script.py"
    script.write_text(ENDS)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={ranks.free_port()}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    subprocess.run([*command, str(script), str(tmp_path)], env=environment, timeout=200, check=True)
    expected = ranks.run_ranks(trained, 2, (2, 2, torch.float32, 3, {}))
    for rank, weights in enumerate(expected):
        found = torch.load(tmp_path / str(rank)).values()
        assert all(torch.equal(*pair) for pair in zip(found, weights, strict=True))


def lonely():
    schedule = built(model(2, torch.float32)[dist.get_rank()], 2, 2, timeout=3.0)
    inputs, target = batch(0, 2, torch.float32)
    if dist.get_rank() == 0:
        schedule.step(inputs)
        schedule.drain()
    return target


def test_a_stage_that_stays_away_is_named_within_the_timeout():
    outcome = ranks.gather_outcomes(lonely, 2, timeout=60.0)[0]
    assert LinkError.__name__ in outcome.raised
    said = outcome.error[outcome.error.index("LinkError: ") :]
    assert said.startswith("LinkError: stage 0 (rank 0)"), said
    assert "stage 1 (rank 1)" in said


def evaluated_alone():
    schedule = built(model(2, torch.float32)[dist.get_rank()], 2, 2, timeout=3.0)
    inputs, _ = batch(0, 2, torch.float32)
    if dist.get_rank() == 1:
        time.sleep(600)
    schedule.eval(inputs)


def test_an_evaluation_that_one_stage_misses_ends_within_the_timeout():
    waits, misses = ranks.gather_outcomes(evaluated_alone, 2, timeout=60.0, grace=2.0)
    assert misses.ended == "killed", misses
    assert waits.raised[:1] == (LinkError.__name__,), waits.error
    assert "LinkError: stage 0 (rank 0) evaluated together with the other ranks (rank 1)" in waits.error


def lost_replica(how):
    """Two stages, two replicas in DDP, of which rank 3 is lost in its second update."""
    from paci_schedule.adapters.torch import SchedulePaci

    rank, (stages, replicas) = dist.get_rank(), ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    pipeline = dist.new_subgroups_by_enumeration(stages)[0]
    group = dist.new_subgroups_by_enumeration(replicas)[0]
    module = ddp(model(2, torch.float32)[rank % 2], group)
    stage = PipelineStage(module, rank % 2, 2, torch.device("cpu"), group=pipeline)
    optimizer = adamw(module)
    schedule = SchedulePaci(stage, 2, loss_fn, optimizers=optimizer, timeout=3.0)
    calls = []

    def lose(*_):
        calls.append(1)
        if rank == 3 and len(calls) == 3:
            os._exit(9) if how == "dies" else time.sleep(600)

    module.module.register_forward_pre_hook(lose)
    for number in range(4):
        inputs, target = batch(number, 2, torch.float32)
        schedule.step(*([inputs] if rank % 2 == 0 else []), target=target if rank % 2 else None)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_replica_ends_the_others_within_the_timeout(how):
    outcomes = ranks.gather_outcomes(lost_replica, 4, (how,), timeout=60.0, grace=6.0)
    assert outcomes.pop(3).ended == {"dies": "died", "hangs": "killed"}[how]
    for outcome in outcomes:
        assert outcome.raised[:1] == (LinkError.__name__,), outcome.error
    said = outcomes[1].error.rpartition("LinkError: ")[2]
    assert said.startswith("stage 1 (rank 1) worked (at B"), said
    assert "together with the other ranks of this stage (rank 3) and got no answer" in said


def compared():
    """Evaluations and outputs as of the stock schedule, at the same weights."""
    accumulation = 4
    module = model(2, torch.float32)[dist.get_rank()]
    ours = built(module, 2, accumulation)
    stage = PipelineStage(copy.deepcopy(module), dist.get_rank(), 2, torch.device("cpu"))
    stock = Schedule1F1B(stage, accumulation, loss_fn)
    inputs, target = batch(0, accumulation, torch.float32)
    first, last = dist.get_rank() == 0, dist.get_rank() == 1
    calls = [(schedule.step, []) for schedule in (ours, stock)] + [(schedule.eval, []) for schedule in (ours, stock)]
    results = []
    for call, losses in calls:
        if call == ours.eval:
            stage.submod.load_state_dict(module.state_dict())
        output = call(*([inputs] if first else []), target=target if last else None, losses=losses if last else None)
        results.append((output, [loss.item() for loss in losses]))
        if call == ours.step:
            ours.drain()
            stepped = [weight.detach().clone() for weight in module.parameters()]
    return results, len(stepped)


def test_outputs_losses_and_evaluations_are_those_of_the_stock_schedule():
    _, (results, _) = ranks.run_ranks(compared, 2)
    stepped, stock_stepped, evaluated, stock_evaluated = results
    for (mine, losses), (theirs, truth) in ((stepped, stock_stepped), (evaluated, stock_evaluated)):
        assert torch.equal(mine, theirs)
        assert losses == truth
        assert len(losses) == 4
        assert all(map(math.isfinite, losses))
    assert evaluated[1] != stepped[1]


def test_the_name_finds_the_schedule_where_torch_looks_names_up():
    import paci_schedule
    from paci_schedule.adapters.torch import SchedulePaci, register

    stock = schedules.get_schedule_class
    try:
        paci_schedule.register("torch")
        paci_schedule.register("torch")
        assert schedules.get_schedule_class("PACI") is SchedulePaci
        with pytest.raises(ConfigError, match="SchedulePaci\\(prediction='often'\\)"):
            register({"prediction": "often"})
        register({"prediction": "every"})
        found = schedules.get_schedule_class("paci")
        assert issubclass(found, SchedulePaci)
        assert found.defaults == {"prediction": "every"}
        assert schedules.get_schedule_class("1f1b") is Schedule1F1B
        with pytest.raises(ValueError, match="Unknown schedule name"):
            schedules.get_schedule_class("pacy")
    finally:
        schedules.get_schedule_class = stock


def saved_alone():
    """A tied job of three stages, of which the first one stops before it posts the last sum, and the others save."""
    job = Job(stages=3, accumulation=1, script=(), model="tied", config={"paci": {"timeout": 3.0}})
    schedule, _ = torch_job.build(job)
    feed = deepspeed_job.Feed(jobs.data("tied"))
    for action in ("train", "train", "train", "drain"):
        if action == "drain" and dist.get_rank() == 0:
            for gradient in schedule._ties.gradients.values():
                gradient._post = lambda count: time.sleep(600 * count)
        torch_job.act(schedule, job, dist.get_rank(), action, feed, {})
    schedule.state_dict()


def test_a_state_that_one_stage_does_not_save_is_an_error_that_names_it():
    misses, *_, waits = ranks.gather_outcomes(saved_alone, 3, timeout=60.0, grace=2.0)
    assert misses.ended == "killed", misses
    assert waits.raised[:1] == (LinkError.__name__,), waits.error
    said = "LinkError: stage 2 (rank 2) summed the gradients of a tied weight over the stages that hold it (rank 0)"
    assert said in waits.error

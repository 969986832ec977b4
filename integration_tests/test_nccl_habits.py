"""A few jobs of every kind on ranks whose process groups have NCCL's habits: as the reference, with difference 0.

`PACI_TEST_BACKEND=nccl_like` runs any other test so.
"""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllreduceOptions

from integration_tests.test_deepspeed_replicas import REPLICAS, by_replica, follow_all
from paci_schedule.runtime.deferred.norms import NormGroup
from testing import deepspeed_job, jobs, nccl_like, ranks
from testing.jobs import Job
from testing.reference.deepspeed import run as reference_of

SCRIPT = ("train x3", "drain", "train x2", "eval", "save", "train x2")
SWITCHES = ("train x2", "schedule=1f1b", "train x2", "schedule=paci", "train x2", "drain")


@pytest.fixture(autouse=True)
def _backend(monkeypatch):
    monkeypatch.setenv("PACI_TEST_BACKEND", nccl_like.BACKEND)


THREE_STAGES = {
    "fp32": Job(stages=3, accumulation=2, script=SCRIPT, optimizer="groups"),
    "bf16": Job(stages=3, accumulation=2, script=SCRIPT, precision="bf16"),
    "tuples": Job(stages=3, accumulation=1, script=SCRIPT, model="pairs"),
    "clipping": Job(stages=3, accumulation=2, script=SCRIPT, clip=0.7),
    "clipping, bf16": Job(stages=3, accumulation=2, script=SWITCHES, clip=0.7, precision="bf16"),
    "tied, clipping": Job(stages=3, accumulation=1, script=SWITCHES, clip=3.0, model="tied"),
    "slack": Job(stages=3, accumulation=2, script=SCRIPT, clip=0.6, config={"paci": {"extra_in_flight": [2, 1]}}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return deepspeed_job.Runs(THREE_STAGES, tmp_path_factory.mktemp("habits"))


@pytest.mark.parametrize("name", THREE_STAGES)
def test_the_engine_trains_as_the_reference_over_nccls_habits(name, runs):
    deepspeed_job.assert_as_reference(THREE_STAGES[name], runs[name])


def test_replicas_train_as_the_reference_over_nccls_habits(tmp_path):
    scripts = {
        "bf16": Job(stages=2, accumulation=2, script=SCRIPT, clip=0.4, precision="bf16"),
        "tied": Job(stages=2, accumulation=1, script=SCRIPT, clip=2.0, model="tied"),
    }
    results = ranks.run_ranks(follow_all, 2 * REPLICAS, (scripts, str(tmp_path)))
    for name, job in scripts.items():
        expected = reference_of(job, REPLICAS)
        for of_one in by_replica([result[name] for result in results]):
            deepspeed_job.assert_equal(of_one, expected)


def save_and_go_on(job, folder):
    """Losses of two batches after a checkpoint, by the run that wrote it and by one that has loaded it."""
    losses = []
    for resumes in (False, True):
        engine = deepspeed_job.build(job)
        feed = jobs.data(job.model)
        for _ in range(3):
            next(feed) if resumes else engine.train_batch(feed)
        if resumes:
            engine.load_checkpoint(folder, tag="common")
        else:
            engine.save_checkpoint(folder, tag="common")
        feed = jobs.data(job.model, 3)
        losses.append([engine.train_batch(feed).item() for _ in range(2)])
        losses[-1].append(engine.drain().item())
    return losses


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    job = Job(stages=3, accumulation=1, script=(), model="tied", clip=3.0, precision="bf16")
    for went_on, resumed in ranks.run_ranks(save_and_go_on, 3, (job, str(tmp_path))):
        assert resumed == pytest.approx(went_on, rel=0, nan_ok=True)


def test_megatron_trains_as_the_reference_over_nccls_habits():
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    from integration_tests.megatron_checks import assert_as_reference
    from testing.megatron_model import GptJob

    sharded = {"bf16": True, "distributed_optimizer": True}
    jobs = [
        GptJob(stages=2, accumulation=2, clip_grad=1.0),
        GptJob(stages=2, accumulation=1, clip_grad=0.2, tied=True, **sharded),
        GptJob(stages=2, accumulation=2, clip_grad=0.2, tied=True, **sharded, paci={"prediction": "window"}),
    ]
    assert_as_reference(jobs)


def train_and_synchronise(job):
    """Four batches, with a synchronisation of the last stage's device after each, as of a profiler or empty_cache."""
    engine = deepspeed_job.build(job)
    feed = jobs.data(job.model)
    for _ in range(4):
        engine.train_batch(feed)
        if engine.is_last_stage():
            nccl_like.synchronize(5)
    engine.drain()
    return engine.global_steps


@pytest.mark.parametrize("model", ["words", "tied"])
def test_the_last_stage_may_synchronise_its_device_between_two_calls(model):
    job = Job(stages=3, accumulation=1, script=(), model=model)
    assert ranks.run_ranks(train_and_synchronise, 3, (job,), timeout=60) == [4, 4, 4]


SYNCHRONISED = {
    "words": Job(stages=3, accumulation=2, script=("train x4",)),
    "tied, clipping": Job(stages=3, accumulation=1, script=("train x4",), model="tied", clip=3.0),
    "slack": Job(stages=3, accumulation=2, script=("train x4",), config={"paci": {"extra_in_flight": [2, 1]}}),
}


def train_synchronised(job):
    """As a job whose every op, from the first one on, ends with a synchronisation of the device."""
    engine = deepspeed_job.build(job)
    compute = engine._runner._compute
    for name in ("forward", "backward", "step"):
        setattr(compute, name, then_synchronised(getattr(compute, name)))
    feed = jobs.data(job.model)
    losses = [then_synchronised(engine.train_batch)(feed).item() for _ in job.actions()]
    then_synchronised(engine.drain)()
    return losses


def then_synchronised(function):
    def synchronised(*args):
        result = function(*args)
        nccl_like.synchronize(20)
        return result

    return synchronised


@pytest.mark.parametrize("name", SYNCHRONISED)
def test_every_op_of_every_stage_may_synchronise_its_device_from_the_first_one_on(name):
    job = SYNCHRONISED[name]
    expected = reference_of(job)
    for stage, losses in enumerate(ranks.run_ranks(train_synchronised, 3, (job,), timeout=100)):
        truth = [moment.loss[stage] for moment in expected]
        assert losses == pytest.approx(truth, rel=1e-6, nan_ok=True)


class Completing:
    """Norms that double what the stage has summed, or fail."""

    def __init__(self, error=None):
        self.error, self.own = error, []

    def complete(self, square):
        if self.error:
            raise self.error
        square.mul_(2)

    def add_own(self, square):
        self.own.append(square.item())


def sums(asynchronous, flushing):
    """A sum over the stage, made part of one over all stages; under a flush the large group's, and the stage's own."""
    norms = Completing()
    group = NormGroup(norms, dist.group.WORLD, dist.new_group([0, 1]))
    group.flushing = flushing
    square = torch.tensor([dist.get_rank() + 1.0])
    work = dist.all_reduce(square, group=group, async_op=asynchronous)
    if asynchronous:
        work.wait()
    maximum = torch.tensor([dist.get_rank() + 1.0])
    options = AllreduceOptions()
    options.reduceOp, options.asyncOp = dist.ReduceOp.MAX, False
    assert group.allreduce([maximum], options) is None
    return square.item(), maximum.item(), norms.own


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("flushing", [False, True])
def test_a_norm_is_summed_over_the_stage_before_others_are_added(asynchronous, flushing):
    expected = (3.0, 2.0, [3.0]) if flushing else (6.0, 2.0, [])
    assert ranks.run_ranks(sums, 2, (asynchronous, flushing)) == [expected] * 2


def fail_inside():
    group = NormGroup(Completing(LookupError("lost")), dist.group.WORLD, dist.group.WORLD)
    with pytest.raises(LookupError, match="lost"):
        dist.all_reduce(torch.ones(1), group=group)
    dist.destroy_process_group()


def test_an_error_inside_the_norms_group_is_raised_unchanged():
    ranks.run_ranks(fail_inside, 2)

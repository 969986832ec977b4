"""The groups of the links: in how many steps they are made, between whom, and that messages travel over them."""

import types
from collections import Counter
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.runtime import communicators
from paci_schedule.runtime.links import Links
from paci_schedule.runtime.waiting import WATCHDOG_MARGIN
from testing.ranks import on_gpus, run_ranks

TIMEOUT = timedelta(seconds=30)
CPU = torch.device("cpu")
BOUND = torch.device("cuda", 3)


def pipelines(stages, replicas):
    """Global ranks of each stage of each pipeline, as Megatron and DeepSpeed number them."""
    return [list(range(replica, stages * replicas, replicas)) for replica in range(replicas)]


def calls_of(rank, world, jobs, backend, monkeypatch):
    """The groups that a rank takes part in making, in order, as (name, ranks, options); and the pairs it gets."""
    calls = []

    def spy(size, own_rank, ranks, asked_backend, store, name, **rest):
        assert size == len(ranks)
        assert own_rank == (ranks.index(rank) if rank in ranks else None)
        calls.append((name, tuple(ranks), asked_backend, rest))
        return (object() if rank in ranks else dist.GroupMember.NON_GROUP_MEMBER), None

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    dist.distributed_c10d._get_default_group().bound_device_id = BOUND if backend == "nccl" else None
    try:
        with monkeypatch.context() as patch:
            patch.setattr(communicators, "_new_process_group_helper", spy)
            patch.setattr(communicators, "backend_for", lambda device: backend)
            patch.setattr(communicators, "link_options", lambda *_: None)
            return calls, communicators.connect(jobs, CPU, TIMEOUT)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
@pytest.mark.parametrize(("stages", "replicas", "steps"), [(1, 3, 0), (2, 1, 3), (3, 1, 5), (5, 2, 5), (16, 16, 5)])
def test_the_number_of_steps_does_not_grow_with_the_job(stages, replicas, steps, backend, monkeypatch):
    world, jobs = stages * replicas, pipelines(stages, replicas)
    made, seen = [], Counter()
    for rank in range(world):
        calls, pairs = calls_of(rank, world, jobs, backend, monkeypatch)
        made.append(calls)
        assert len(calls) == steps if backend == "nccl" else len(calls) <= steps
        for pair in pairs:
            assert len({pair.down, pair.up, pair.announcements}) == 3
            seen[pair.ranks] += 1
        stage = next(ranks.index(rank) for ranks in jobs if rank in ranks)
        assert len(pairs) == (stage > 0) + (stage < stages - 1)
    assert seen == {tuple(ranks[at : at + 2]): 2 for ranks in jobs for at in range(stages - 1)}
    # Ends agree on the name of a group, and nobody else has it.
    names = Counter(name for rank, calls in enumerate(made) for name, ranks, *_ in calls if rank in ranks)
    sizes = {name: len(ranks) for calls in made for name, ranks, *_ in calls}
    assert all(names[name] == sizes[name] for name in names)
    if backend == "nccl":  # one split at a time: in every step all ranks speak of the same kind of group
        for step in zip(*made, strict=True):
            assert len({name.rpartition(" ")[0] for name, *_ in step}) == 1
        # A call for NCCL with the bound device splits the world's communicator, or takes part in its being split.
        for calls in made:
            splits = [rest["device_id"] for _, _, asked, rest in calls if asked == "nccl"]
            assert splits == [BOUND] * max(0, steps - 1)
            assert all(rest["device_id"] is None for _, _, asked, rest in calls if asked == "gloo")


def test_on_nccl_the_watchdog_comes_after_the_timeout(monkeypatch):
    calls, _ = calls_of(1, 3, [[0, 1, 2]], "nccl", monkeypatch)
    timeouts = {name.split()[2]: rest["timeout"] for name, *_, rest in calls}
    later = TIMEOUT + WATCHDOG_MARGIN
    assert timeouts == {"announcements": TIMEOUT, "activation": later, "gradient": later}


class FakeOptions:
    """NCCL's options, as torch has them where NCCL has no config."""

    def __init__(self, is_high_priority_stream=False):
        self.is_high_priority_stream = is_high_priority_stream


class FakeOptionsWithConfig(FakeOptions):
    def __init__(self, is_high_priority_stream=False):
        super().__init__(is_high_priority_stream)
        self.config = types.SimpleNamespace(max_ctas=-1, min_ctas=-1)


def test_links_ask_nccl_for_priority_and_few_ctas(monkeypatch):
    for kind in (FakeOptions, FakeOptionsWithConfig):
        monkeypatch.setattr(dist, "ProcessGroupNCCL", types.SimpleNamespace(Options=kind), raising=False)
        options = communicators.link_options("nccl", TIMEOUT)
        assert options.is_high_priority_stream
        assert options._timeout == TIMEOUT
        if kind is FakeOptionsWithConfig:
            assert (options.config.max_ctas, options.config.min_ctas) == (4, -1)
        assert communicators.link_options("gloo", TIMEOUT) is None


def relay(jobs, uneven):
    """A number goes down each pipeline and up again, over two sets of links; what this rank saw of it, down and up."""
    if uneven:  # ranks hold different numbers of groups, as with Megatron's embedding group
        dist.new_group([0, 3])
    rank, op, seen = dist.get_rank(), Op(OpKind.FORWARD, 0), []
    ranks = next(ranks for ranks in jobs if rank in ranks)
    stage, spec = ranks.index(rank), PipelineSpec(stages=len(ranks), accumulation=1)
    for start in (100.0, 200.0):
        links = Links(jobs, CPU, TIMEOUT)
        number = torch.tensor([start + 10 * ranks[0]])
        if stage > 0:
            links.expect_activation(op)
            number, _ = links.recv_activation(op)
        seen.append(number.item())
        if stage < spec.stages - 1:
            links.send_activation(op, number + 1, ())
            links.expect_gradient(op)
            number, _ = links.recv_gradient(op)
        seen.append(number.item())
        if stage > 0:
            links.send_gradient(op, number + 1, ())
        assert links.announce(op, 1, lambda: [0, 0])
        links.finish()
    groups = sum("paci" in name for name in dist.distributed_c10d._world.pg_names.values())
    return seen, groups


@pytest.mark.skipif(on_gpus(4), reason="the messages are on the host")
@pytest.mark.parametrize("uneven", [False, True], ids=["", "ranks hold different groups"])
@pytest.mark.parametrize("jobs", [[[0, 1, 2, 3]], [[0, 2], [1, 3]], [[3, 1, 0, 2]]], ids=str)
def test_messages_travel_over_the_groups(jobs, uneven):
    outcomes = run_ranks(relay, 4, (jobs, uneven), timeout=180)
    for ranks in jobs:
        for stage, rank in enumerate(ranks):
            seen, groups = outcomes[rank]
            first, last = 10 * ranks[0], len(ranks) - 1
            up = last + (last - stage)
            assert seen == [start + first + way for start in (100, 200) for way in (stage, up)]
            assert groups == 2 * (1 + 2 * (1 if stage in (0, last) else 2))

"""The transport for ranks that share a GPU, between real ranks: here host memory stands in for the GPU's."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.runtime import shared_gpu
from paci_schedule.runtime.links import Links
from paci_schedule.runtime.waiting import shorten_timeout
from testing.ranks import on_gpus, run_ranks

pytestmark = pytest.mark.skipif(on_gpus(2), reason="ranks do not share a GPU here")

COUNT = 5


def exchange():
    """Messages both ways over the links of two stages: what this stage got, and how many were shared_gpu."""
    dist.Backend.register_backend(shared_gpu.BACKEND, shared_gpu.SharedGpuGroup, devices=["cpu", "cuda"])
    seen = []
    shared_gpu._is_on_host = lambda tensor: seen.append(tensor.numel())
    stage, store, got = dist.get_rank(), dist.distributed_c10d._get_default_store(), []
    dist.destroy_process_group()
    dist.init_process_group(
        shared_gpu.BACKEND,
        store=dist.PrefixStore("shared_gpu", store),
        rank=stage,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    links = Links([[0, 1]], torch.device("cpu"), timedelta(seconds=20))
    for index in range(COUNT):
        payload, rider = torch.full((3, 7), float(index + 10 * stage)), torch.tensor([float(index)])
        forward = Op(OpKind.FORWARD, index)
        if stage == 0:
            links.send_activation(forward, payload, (rider,))
            links.expect_gradient(forward)
            got.append(links.recv_gradient(forward))
        else:
            links.expect_activation(forward)
            got.append(links.recv_activation(forward))
            links.send_gradient(forward, payload, (rider,))
    links.finish()
    total, group = torch.tensor([stage + 1.0]), dist.new_group([0, 1])
    shorten_timeout(group, timedelta(seconds=5))  # which such a group cannot be told
    dist.all_reduce(total, group=group)
    return [(payload.clone(), rider.clone()) for payload, (rider,) in got], total.item(), len(seen)


def test_messages_arrive_through_host_memory():
    for stage, (got, total, count) in enumerate(run_ranks(exchange, 2)):
        assert total == 3.0
        assert count >= 2 * COUNT
        for index, (payload, rider) in enumerate(got):
            assert torch.equal(payload, torch.full((3, 7), index + 10.0 * (1 - stage)))
            assert rider.item() == index


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (2, 2), (4, 2)])
def test_a_gpu_for_every_rank_or_none_is_left_alone(monkeypatch, gpus, ranks):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not shared_gpu.share_gpus()
    assert os.environ["LOCAL_RANK"] == "1"

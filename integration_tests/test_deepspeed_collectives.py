"""No hidden flush: a steady-state train_batch runs no collective over a group that spans stages.

Every collective is recorded where all of them pass, stock or not, by whatever name it was called: at the process group.
"""

import traceback

import pytest
import torch.distributed as dist

from testing import deepspeed_job, jobs, ranks
from testing.collectives import MESSAGES, recorded
from testing.jobs import Job


def steady_calls(job, schedule, warm_up, count):
    """What runs in `count` train_batch calls after the first `warm_up`: (name, ranks of the group, who called)."""
    engine = deepspeed_job.build(job, schedule)
    feed = jobs.data(job.model, shapes=job.shapes)
    for _ in range(warm_up):
        engine.train_batch(feed)
    seen = []

    def keep(name, members):
        stack = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        seen.append((name, members, [f"{frame.name} ({frame.filename.rpartition('/')[2]})" for frame in stack[-9:-2]]))

    with recorded(keep):
        for _ in range(count):
            engine.train_batch(feed)
    return seen


def spanning(results):
    """The calls whose group has ranks of several stages; without data parallelism every rank is a stage."""
    return [call for result in results for call in result if len(call[1]) > 1]


JOBS = {
    "fp32": Job(stages=3, accumulation=2, script=()),
    "fp32, clipping": Job(stages=3, accumulation=2, script=(), clip=0.1, warmup=True),
    "bf16": Job(stages=3, accumulation=2, script=(), precision="bf16"),
    "bf16, clipping": Job(stages=3, accumulation=2, script=(), precision="bf16", clip=0.1, optimizer="groups"),
    "bf16 sums, clipping": Job(stages=2, accumulation=3, script=(), precision="bf16-bf16", clip=0.1),
    "ZeRO-1, clipping": Job(
        stages=3,
        accumulation=2,
        script=(),
        precision="bf16-bf16",
        clip=0.1,
        config={
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000},
            "zero_allow_untested_optimizer": True,
            "paci": {"clip": "global"},
        },
    ),
    "tuples": Job(stages=3, accumulation=1, script=(), model="pairs"),
    "shapes that change": Job(
        stages=3, accumulation=2, script=(), model="pairs", clip=0.1, shapes=((3, 5), (2, 3), (3, 2))
    ),
}
JOBS["with a monitor and a report of every step"] = Job(
    stages=3,
    accumulation=2,
    script=(),
    clip=0.1,
    config={"steps_per_print": 1, "csv_monitor": {"enabled": True, "output_path": "", "job_name": "collectives"}},
)


@pytest.mark.parametrize("name", JOBS)
def test_no_collective_spans_stages(name, tmp_path):
    job = JOBS[name]
    if "csv_monitor" in job.config:
        job.config["csv_monitor"]["output_path"] = str(tmp_path)
    results = ranks.run_ranks(steady_calls, job.stages, (job, "paci", 3, 4))
    assert not spanning(results)


@pytest.mark.parametrize(
    ("name", "culprit"),
    [
        ("fp32", "_aggregate_total_loss"),
        ("fp32, clipping", "clip_grad_norm_"),
        ("bf16", "get_global_norm_of_tensors"),
    ],
)
def test_the_recorder_catches_what_stock_does(name, culprit):
    """The same recorder on the stock engine sees the loss broadcast, and the gradient norm where there is one."""
    job = JOBS[name]
    results = ranks.run_ranks(steady_calls, job.stages, (job, "stock", 1, 2))
    caught = spanning(results)
    assert {tuple(members) for _, members, _ in caught} == {(0, 1, 2)}
    assert len([call for call in caught if call[0] == "broadcast"]) == 2 * job.stages
    assert any(caller.startswith(culprit) for _, _, callers in caught for caller in callers)


def every_call():
    """Each kind of collective once, through torch.distributed; what of it was recorded."""
    import torch

    seen = []
    ones, two = torch.ones(4), [torch.zeros(4) for _ in range(2)]
    first = dist.get_rank() == 0
    with recorded(lambda name, members: seen.append((name, members))):
        dist.all_reduce(ones)
        dist.broadcast(ones, 0)
        dist.reduce(ones, 0)
        dist.all_gather(two, ones)
        dist.all_gather_into_tensor(torch.zeros(8), ones)
        dist.gather(ones, two if first else None)
        dist.scatter(ones, two if first else None)
        dist.reduce_scatter_tensor(torch.zeros(2), ones)
        dist.all_gather_object([None, None], "x")
        dist.broadcast_object_list(["x"])
        dist.barrier()
        dist.monitored_barrier()
        dist.all_to_all_single(torch.zeros(4), ones)
        dist.send(ones, 1) if first else dist.recv(ones, 0)
    return seen


@pytest.mark.skipif(ranks.on_gpus(2), reason="monitored_barrier and tensors on the CPU are gloo's")
def test_the_recorder_hears_every_collective_and_no_message():
    """Fourteen calls, of which send and recv are none; the two of objects gather or broadcast twice: sizes first."""
    for seen in ranks.run_ranks(every_call, 2):
        assert all(members == [0, 1] for _, members in seen)
        assert len(seen) == 13 + 2
        assert len({name for name, _ in seen}) == 11
        assert not {name for name, _ in seen} & MESSAGES

"""The DeepSpeed engine over NCCL, several stages on the one GPU, against the reference on the CPU.

A GPU adds in another order than a CPU, so weights agree but for rounding, which plain SGD hardly amplifies; versions,
drift, micro-batches in flight and losses are compared as the integration tests do.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.place import Failed, Place
from testing import deepspeed_job
from testing.jobs import Job
from testing.ranks import run_ranks
from testing.reference.deepspeed import run as reference_of

__all__ = ["run"]

_ROUNDING = 2e-3
_SCRIPT = ("train x4", "drain", "train x3", "eval", "train x2", "drain")
_REPLICAS = 2


def _job(**options: Any) -> Job:
    return Job(script=_SCRIPT, optimizer="sgd", **options)


_JOBS = {
    "P=2": _job(stages=2, accumulation=3),
    "P=2, clipping": _job(stages=2, accumulation=3, clip=0.4),
    "P=2, tied, clipping": _job(stages=2, accumulation=1, clip=2.0, model="tied"),
    "P=4": _job(stages=4, accumulation=3),
    "P=4, tied, clipping, slack": _job(
        stages=4, accumulation=2, clip=2.0, model="tied", config={"paci": {"extra_in_flight": 3}}
    ),
}
_SYNCHRONISED = "P=2, tied, clipping"
_BOUND = "P=2, clipping"
_WITH_REPLICAS = _job(stages=2, accumulation=3, clip=0.4)


def run(place: Place) -> dict[str, Any]:
    """The largest difference of a weight for each job; raises where a job differs, hangs or fails, after the others."""
    todo = [(name, _JOBS[name], deepspeed_job.train, 1) for name in (list(_JOBS)[:2] if place.dry else _JOBS)]
    synchronised = f"{_SYNCHRONISED}, synchronised in every op and between calls"
    todo += [
        (f"{_BOUND}, a device bound to the default group", _JOBS[_BOUND], _train_bound, 1),
        (synchronised, _JOBS[_SYNCHRONISED], _train_synchronised, 1),
        ("P=2 x DP=2, clipping", _WITH_REPLICAS, _train_replica, _REPLICAS),
    ]
    figures: dict[str, Any] = {}
    failed = []
    ends = time.monotonic() + place.seconds - 5
    for number, (name, job, train, replicas) in enumerate(todo):
        left = (ends - time.monotonic()) / min(3, len(todo) - number)  # what one job does not need, the next ones have
        try:
            results = run_ranks(train, job.stages * replicas, (job,), timeout=left)
            figures[name] = _difference_of(job, results, replicas)
        except Exception as error:
            failed.append(name)
            figures[name] = f"{type(error).__name__}: {error}"[-1500:]
    if failed:
        raise Failed(f"{len(failed)} of {len(todo)} jobs: {', '.join(failed)}", figures)
    return figures


def _difference_of(job: Job, results: list[dict[str, Any]], replicas: int) -> float:
    """As far as any weight is from the reference's at any moment; raises beyond rounding."""
    expected = reference_of(job, replicas)
    return max(_difference(results[replica::replicas], expected) for replica in range(replicas))


def _train_bound(job: Job) -> dict[str, Any]:
    """As DeepSpeed sets up a job: the links' communicators are then split from the default group's."""
    if torch.cuda.is_available():
        rank, world = dist.get_rank(), dist.get_world_size()
        dist.destroy_process_group()
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), world, is_master=False)
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(
            "nccl", store=dist.PrefixStore("bound", store), rank=rank, world_size=world, device_id=device
        )
    return deepspeed_job.train(job)


def _train_synchronised(job: Job) -> dict[str, Any]:
    _synchronise_always()
    return deepspeed_job.train(job)


def _train_replica(job: Job) -> dict[str, Any]:
    engine = deepspeed_job.build(job)
    return deepspeed_job.follow(engine, job.of_replica(engine.grid.get_data_parallel_rank()))


def _synchronise_always() -> None:
    """From here on, wait for the whole device inside every forward, backward and update, and after every call."""
    from paci_schedule.adapters.deepspeed.compute import EngineCompute
    from paci_schedule.adapters.deepspeed.engine import PaciPipelineEngine

    for name in ("forward", "backward", "step"):
        setattr(EngineCompute, name, _then_synchronised(getattr(EngineCompute, name)))
    PaciPipelineEngine.train_batch = _then_synchronised(PaciPipelineEngine.train_batch)


def _then_synchronised(function: Any) -> Any:
    def synchronised(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return synchronised


def _difference(results: list[dict[str, Any]], expected: Any) -> float:
    """As far as the weights of any stage are from the reference's at any moment; raises beyond rounding."""
    deepspeed_job.assert_equal(results, expected, rounding=_ROUNDING)
    return max(
        (result["moments"][number]["weights"][name].float() - value.float()).abs().max().item()
        for stage, result in enumerate(results)
        for number, truth in enumerate(expected)
        for name, value in truth.weights[stage].items()
    )

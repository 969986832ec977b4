"""The DeepSpeed engine over NCCL, several stages on the one GPU, against the reference on the CPU.

A GPU adds in another order than a CPU, so weights agree but for rounding, which plain SGD hardly amplifies; versions,
drift, micro-batches in flight and losses are compared as the integration tests do.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.place import Place
from integration_tests import deepspeed_job, late_job, late_oracle, replica_oracle
from integration_tests.jobs import Job
from integration_tests.late_oracle import LateReference
from integration_tests.ranks import run_ranks

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
    """The largest difference of a weight for each job; raises where a job differs, hangs or fails."""
    names = list(_JOBS)[:2] if place.dry else list(_JOBS)
    each = (place.seconds - 5) / (len(names) + 4)
    figures: dict[str, Any] = {}
    for name in names:
        job = _JOBS[name]
        figures[name] = _compared(job, run_ranks(late_job.train, job.stages, (job,), timeout=each))
    job = _JOBS[_BOUND]
    results = run_ranks(_train_bound, job.stages, (job,), timeout=each)
    figures[f"{_BOUND}, a device bound to the default group"] = _compared(job, results)
    job = _JOBS[_SYNCHRONISED]
    results = run_ranks(_train_synchronised, job.stages, (job,), timeout=each)
    figures[f"{_SYNCHRONISED}, synchronised in every op and between calls"] = _compared(job, results)
    results = run_ranks(_train_replica, 2 * _REPLICAS, (_WITH_REPLICAS,), timeout=each)
    expected = replica_oracle.run(_WITH_REPLICAS, _REPLICAS, kind=LateReference)
    figures["P=2 x DP=2, clipping"] = max(
        _difference(results[replica::_REPLICAS], expected) for replica in range(_REPLICAS)
    )
    return figures


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
    return late_job.train(job)


def _train_synchronised(job: Job) -> dict[str, Any]:
    _synchronise_always()
    return late_job.train(job)


def _train_replica(job: Job) -> dict[str, Any]:
    engine = late_job.build(job)
    mine = replica_oracle.replica_job(job, engine.grid.get_data_parallel_rank())
    return deepspeed_job.follow(engine, mine, "paci", None)


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


def _compared(job: Job, results: list[dict[str, Any]]) -> float:
    return _difference(results, late_oracle.run(job))


def _difference(results: list[dict[str, Any]], expected: Any) -> float:
    """As far as the weights of any stage are from the reference's at any moment; raises beyond rounding."""
    deepspeed_job.assert_equal(results, expected, rounding=_ROUNDING)
    return max(
        (result["moments"][number]["weights"][name].float() - value.float()).abs().max().item()
        for stage, result in enumerate(results)
        for number, truth in enumerate(expected)
        for name, value in truth.weights[stage].items()
    )

"""In steady state the host waits for the device only where stock does: no other read, blocking copy or synchronise."""

import dataclasses
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from integration_tests.host_waits import HostWaits
from integration_tests.test_deepspeed_collectives import JOBS
from paci_schedule.runtime.host_copy import HostCopy
from paci_schedule.runtime.upload import upload
from testing import deepspeed_job, jobs, megatron_job, ranks
from testing.megatron_model import GptJob, set_up

READS, UPLOADS = "reads an element", "uploads and waits"

# ---- the recorder itself --------------------------------------------------------------------------------------------


def waits_of(action):
    """What the recorder sees while `action` is given a batch in the host's memory: kinds only."""
    waits = HostWaits()
    [batch] = waits.on_host(iter([torch.ones(3)]))
    with waits:
        action(batch, torch.ones(3))
    return {what for what, _, _ in waits.seen}


CPU = torch.device("cpu")


def a_work():
    """A rank of a process group with only this process in it, which has nobody to wait for."""
    return dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=9)).allreduce([torch.ones(1)])


def has_come(copy):
    """The numbers of a copy, once it has come to the host."""
    return copy.has_arrived() and copy.numbers()


@pytest.mark.parametrize(
    ("action", "kinds"),
    [
        (lambda batch, there: there[0].item(), {READS}),
        (lambda batch, there: bool(there.sum() > 0), {READS}),
        (lambda batch, there: there.tolist(), {"downloads and waits"}),
        (lambda batch, there: there.cpu(), {"downloads and waits"}),
        (lambda batch, there: torch.cuda.synchronize(), {"synchronises"}),
        (lambda batch, there: torch.cuda.Event.synchronize(None), {"synchronises"}),
        (lambda batch, there: a_work().wait(timedelta(seconds=9)), {"waits with a timeout"}),
        (lambda batch, there: a_work().wait(), set()),
        (lambda batch, there: batch.to(CPU), {UPLOADS}),
        (lambda batch, there: batch.cuda(), {UPLOADS}),
        (lambda batch, there: (batch + 1)[:2].to(CPU), {UPLOADS}),
        (lambda batch, there: batch.to(CPU, non_blocking=True), {UPLOADS}),  # the memory is pageable
        (lambda batch, there: batch.pin_memory().to(CPU), {UPLOADS}),
        (lambda batch, there: batch.pin_memory().to(CPU, non_blocking=True) + there, set()),
        (lambda batch, there: batch.to(torch.float64), set()),
        (lambda batch, there: upload((batch, [batch]), CPU)[1][0].to(CPU) + there, set()),
        (lambda batch, there: HostCopy(there).numbers(), {"downloads and waits"}),
        (lambda batch, there: has_come(HostCopy(there)), set()),
    ],
)
def test_each_kind_of_wait_is_seen(action, kinds):
    assert waits_of(action) == kinds


def test_an_upload_keeps_values_and_structure_and_copies_nothing_that_is_there():
    waits = HostWaits()
    [batch] = waits.on_host(iter([{"ids": (torch.arange(4), [torch.eye(2)]), "name": "x"}]))
    with waits:
        there = upload(batch, CPU)
        again = upload(there, CPU)
    assert torch.equal(there["ids"][0], torch.arange(4))
    assert torch.equal(there["ids"][1][0], torch.eye(2))
    assert there["name"] == "x"
    assert again["ids"][0] is there["ids"][0]


# ---- DeepSpeed ------------------------------------------------------------------------------------------------------


def waits_of_deepspeed(job):
    """What waits in steady state: under stock, and under PACI."""
    seen = []
    for schedule in ("stock", "paci"):
        engine = deepspeed_job.build(job, schedule)
        waits = HostWaits()
        feed = waits.on_host(jobs.data(job.model, shapes=job.shapes))
        for _ in range(4):
            engine.train_batch(feed)
        with waits:
            for _ in range(3):
                engine.train_batch(feed)
        seen.append(waits.seen)
    return seen


@pytest.mark.parametrize(
    ("name", "model", "readers"),
    [
        ("fp32, clipping", "words", {("engine.py", "_take_model_step")}),
        ("shapes that change", "pairs", {("engine.py", "_take_model_step")}),
        (
            "bf16, clipping",
            "tied",
            {
                ("bf16_optimizer.py", "step"),
                ("utils.py", "is_invalid_grad_norm"),
                ("utils.py", "clip_tensors_by_global_norm"),
            },
        ),
        (
            "ZeRO-1, clipping",
            "tied",
            {
                ("stage_1_and_2.py", "_optimizer_step"),
                ("utils.py", "is_invalid_grad_norm"),
                ("stage_1_and_2.py", "has_overflow"),
            },
        ),
    ],
)
def test_deepspeed_s_host_waits_nowhere_that_stock_s_does_not_and_no_more_for_the_data(name, model, readers):
    """The first reader of each is AdamW, whose count of steps is on the host, as is the word that there is a batch."""
    job = dataclasses.replace(JOBS[name], model=model)
    results = ranks.run_ranks(waits_of_deepspeed, job.stages, (job,))
    for stage, (stock, paci) in enumerate(results):
        reads = {(READS, *reader) for reader in readers}
        loads = {(UPLOADS, "engine.py", "_exec_load_micro_batch")} if stage in (0, job.stages - 1) else set()
        own = {wait for wait in stock if wait[1] == "jobs.py"}  # the model's
        shapes = {wait for wait in stock if wait[2] == "_recv_tensor_meta"}
        assert bool(shapes) == bool(job.shapes and stage)
        assert stock == reads | loads | own | shapes
        assert paci == reads | {("downloads and waits", "links.py", "announce")} | own


@pytest.mark.parametrize("name", ["fp32, clipping", "bf16, clipping", "ZeRO-1, clipping"])
def test_a_prediction_makes_the_host_wait_nowhere(name):
    """Only AdamW reads: its count of steps is on the host, as in the update."""
    config = {**JOBS[name].config, "paci": {"clip": "global"}}
    plain = dataclasses.replace(JOBS[name], config=config)
    predicting = dataclasses.replace(plain, config={**config, "paci": {"clip": "global", "prediction": "every"}})
    results = [ranks.run_ranks(waits_of_deepspeed, plain.stages, (job,)) for job in (plain, predicting)]
    for stage, ((_, before), (_, now)) in enumerate(zip(*results, strict=True)):
        assert now - before == ({(READS, "shadow.py", "advance")} if stage < plain.stages - 1 else set())


# ---- Megatron -------------------------------------------------------------------------------------------------------


def waits_of_megatron(job):
    """What waits in the calls after the third and in the updates after them."""
    megatron_job.prepare()
    set_up(job)
    waits = HostWaits()

    def begins(call):
        if call == 3:
            waits.__enter__()

    try:
        megatron_job.train(job, begins)
    finally:
        waits.__exit__(None, None, None)
    return waits.seen


@pytest.mark.parametrize(
    "change",
    [{}, {"clip_grad": 0.2, "tied": True}, {"bf16": True, "distributed_optimizer": True, "clip_grad": 0.2}],
    ids=["plain", "tied, clipping", "distributed optimizer, clipping"],
)
def test_megatron_s_host_waits_nowhere_that_stock_s_does_not(change):
    job = GptJob(stages=2, accumulation=2, calls=6, **change)
    results = [
        ranks.run_ranks(waits_of_megatron, 2, (dataclasses.replace(job, schedule=schedule),))
        for schedule in ("1f1b", "paci")
    ]
    for stock, paci in zip(*results, strict=True):
        ours = {wait for wait in paci - stock if wait[1:] != ("stream.py", "stats")}  # the test asks for the loss
        assert stock
        assert not ours


def waits_of_each(jobs):
    return [waits_of_megatron(job) for job in jobs]


def test_a_prediction_on_megatron_makes_the_host_wait_nowhere():
    """Only AdamW reads, as on DeepSpeed: its count of steps is on the host."""
    plain = GptJob(stages=2, accumulation=2, calls=6, clip_grad=0.2, tied=True)
    jobs = [plain, dataclasses.replace(plain, bf16=True, distributed_optimizer=True)]
    predicting = [dataclasses.replace(job, paci={"prediction": "every"}) for job in jobs]
    for stage, waits in enumerate(ranks.run_ranks(waits_of_each, 2, ([*jobs, *predicting],))):
        for before, now in zip(waits[:2], waits[2:], strict=True):
            assert now - before == ({(READS, "shadow.py", "advance")} if stage == 0 else set())

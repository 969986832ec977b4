"""Our schedules against torch.distributed.pipelining's, which were written independently: the same ops in order."""

import json
import os
import re
import subprocess
import sys

import pytest

from paci_schedule import ConfigError, PipelineSpec
from paci_schedule.core.ops import OpKind
from paci_schedule.core.schedules.registry import schedule

THEIR_NAMES = {
    "interleaved-1f1b": "ScheduleInterleaved1F1B",
    "zb-h1": "ScheduleInterleavedZeroBubble",
    "zb-v": "ScheduleZBVZeroBubble",
    "interleaved-zb": "ScheduleInterleavedZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}
SIZES = [(2, 4), (4, 4), (4, 12)]
WHOLE = "dualpipev"  # has backwards that are not split, which torch prints as one action
KINDS = {"F": OpKind.FORWARD, "B": OpKind.BACKWARD, "I": OpKind.BACKWARD, "W": OpKind.WEIGHT}

# Prints, for each job [name, stages, micro-batches, rank 0's positions], the actions of each rank, such as 2F0: stage
# 2, forward, micro-batch 0.
PROGRAM = """
import json, sys, torch, torch.distributed as dist, torch.distributed.pipelining as pipelining
from torch.testing._internal.distributed.fake_pg import FakeStore
orders = []
for name, stages, micro_batches, held in json.loads(sys.argv[1]):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=stages)
    total = stages * len(held)
    parts = [pipelining.PipelineStage(torch.nn.Linear(2, 2), at, total, torch.device("cpu")) for at in held]
    order = getattr(pipelining, name)(parts, micro_batches, loss_fn=torch.nn.MSELoss()).pipeline_order
    orders.append([" ".join(str(action) for action in order[rank] if action is not None) for rank in range(stages)])
    dist.destroy_process_group()
print(json.dumps(orders))
"""


@pytest.fixture(scope="module")
def torch_orders():
    """(schedule, stages, micro-batches) -> for each rank the (kind, micro-batch, position) of torch's ops."""
    asked, jobs = [], []
    for name, theirs in THEIR_NAMES.items():
        for stages, micro_batches in SIZES:
            if name == WHOLE and micro_batches < 2 * stages:
                continue
            held = [schedule(name).position(stages, 0, chunk) for chunk in range(schedule(name).chunks)]
            asked.append((name, stages, micro_batches))
            jobs.append((theirs, stages, micro_batches, held))
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=True)
    orders = [
        [
            [
                (each, int(index), int(at))
                for at, kind, index in re.findall(r"(?<!\d)(\d+)([FBIW])(\d+)(?!\d)", row)
                for each in ([KINDS["B"], KINDS["W"]] if (asked[job][0], kind) == (WHOLE, "B") else [KINDS[kind]])
            ]
            for row in rows
        ]
        for job, rows in enumerate(json.loads(done.stdout.splitlines()[-1]))
    ]
    return dict(zip(asked, orders, strict=True))


@pytest.mark.parametrize("name", THEIR_NAMES)
@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_schedules_order_ops_as_torch_does(torch_orders, name, stages, micro_batches):
    ours, spec = schedule(name), PipelineSpec(stages=stages, accumulation=micro_batches)
    if name == WHOLE and micro_batches < 2 * stages:
        with pytest.raises(ConfigError, match="at least two micro-batches a stage"):
            ours.check(spec)
        return
    rows = [
        [(op.kind, op.index, ours.position(stages, stage, op.chunk)) for op in ours.batch(spec, stage)]
        for stage in range(stages)
    ]
    assert torch_orders[name, stages, micro_batches] == rows

"""The planner against published measurements of Megatron-LM on A100s: arXiv 2401.10241, tables 3 and 4, 1F1B.

Throughput is in samples per second and GPU, memory in GiB.  All twelve speeds follow from
the data sheet and the constants that `plan.hardware` and `plan.transformer` state, which were fitted to all together.
"""

import dataclasses

import pytest

from paci_schedule import PipelineSpec
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.plan.hardware import preset
from paci_schedule.plan.job import Job, Row
from paci_schedule.plan.models import load_config
from paci_schedule.plan.partition import evaluate
from paci_schedule.plan.prices import costs_of, memory_of
from paci_schedule.plan.transformer import from_config
from paci_schedule.simulate.figures import time_per_micro_batch

GIB = 2**30
PUBLISHED = {  # model -> stages, micro-batch size, samples/s/GPU for each number of micro-batches, memory
    "gpt-1.5b": (8, 6, {24: 11.8, 32: 12.5, 64: 13.6}, 30),
    "gpt-6.2b": (8, 3, {24: 3.50, 32: 3.70, 64: 4.03}, 39),
    "gpt-14.6b": (16, 1, {48: 1.40, 64: 1.49, 128: 1.64}, 32),
    "gpt-28.3b": (32, 1, {96: 0.76, 128: 0.80, 256: 0.88}, 43),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_throughput_and_memory_are_within_ten_percent(name):
    stages, size, speeds, memory = PUBLISHED[name]
    model = dataclasses.replace(from_config(load_config(name)), fused_attention=False)
    job = Job(model=model, device=preset("a100"), devices=stages, global_batch=1, zero=0)
    layers, flush = model.layers_on(job.device, size), schedule("1f1b")
    each = (model.layers + 2) // stages  # the first and the last stage have a block less than the others
    bounds = [each * stage for stage in range(stages)] + [model.count]
    for accumulation, speed in speeds.items():
        spec = PipelineSpec(stages=stages, accumulation=accumulation)
        row = Row(
            schedule="1f1b",
            stages=stages,
            replicas=1,
            micro_batch_size=size,
            accumulation=accumulation,
            recompute=False,
        )
        memories = [memory_of(job, flush, spec, row, stage) for stage in range(stages)]
        partition = evaluate(layers, memories, bounds)
        seconds = time_per_micro_batch(flush, spec, costs_of(job, spec, row, layers, partition))
        planned, held = size / seconds / stages, max(partition.peak_bytes) / GIB
        assert planned == pytest.approx(speed, rel=0.1)
        assert held == pytest.approx(memory, rel=0.1)

"""Comparing Megatron jobs with the reference, and where that can be asked for."""

import pytest

from paci_schedule import PipelineSpec
from paci_schedule.core.drift import drift_bound, drift_of
from testing.megatron_job import train_all
from testing.nccl_like import BACKEND as NCCL_LIKE
from testing.ranks import backend, on_gpus, run_ranks
from testing.reference import megatron as reference

STOCK = pytest.mark.skipif(backend(2) == NCCL_LIKE, reason="stock groups its messages, which is not played")
EXACT = pytest.mark.skipif(on_gpus(1), reason="equality to the last bit is asked for on the CPU")


def world(job):
    return job.stages * job.data_parallel * job.tensor_parallel


def stage_ranks(job):
    """Global rank of replica 0, tensor rank 0, of each stage: Megatron numbers tensor, then data, then pipeline."""
    return [stage * job.data_parallel * job.tensor_parallel for stage in range(job.stages)]


def assert_equal(got, expected, what):
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.shape == expected[name].shape
        difference = (tensor.float() - expected[name].float()).abs().max().item()
        assert difference == 0.0, f"{what} {name}: {difference}"


def assert_as_reference(jobs):
    """Weights, norms, losses and drift, with difference 0.  Returns what the ranks gave, by job."""
    ranks = run_ranks(train_all, world(jobs[0]), (jobs,))
    [expected] = run_ranks(reference.train_all, 1, (jobs,))
    for number, job in enumerate(jobs):
        spec = PipelineSpec(stages=job.stages, accumulation=job.accumulation)
        count = job.calls * job.accumulation
        for stage, rank in enumerate(stage_ranks(job)):
            got, should = ranks[rank][number], expected[number][stage]
            assert_equal(got.weights, should.weights, f"{job}, stage {stage}, weight")
            # Shards of an optimizer, and stages under a flush, add up their squares in another order.
            reordered = (job.distributed_optimizer or job.layer_wise) and job.data_parallel > 1
            reordered |= job.stages > 2 and "flush_warmup_steps" in job.paci
            assert got.norms == (pytest.approx(should.norms, rel=1e-5) if reordered else should.norms)
            assert got.losses == (should.losses if stage == job.stages - 1 else [[]] * job.calls)
            drifts = should.drift
            assert got.stats["version"] == job.calls
            assert all(got.kept)
            assert got.stats["backwards"] == count == len(drifts)
            assert got.stats["drift_histogram"] == {drift: drifts.count(drift) for drift in set(drifts)}
            assert got.stats["max_drift"] <= got.stats["drift_bound"] == drift_bound(spec, stage)
            assert got.stats["peak_in_flight"] <= spec.in_flight(stage)
            if not {"drain_interval", "train_iters", "flush_warmup_steps"} & set(job.paci):
                assert drifts == [drift_of(spec, stage, index) for index in range(count)]
    return list(zip(*ranks, strict=True))

"""Drift is known in closed form and counted from the ops: both must agree, drains or not."""

import pytest

from paci_schedule import PipelineSpec
from paci_schedule.core.drift import DriftMeter, drift_bound, drift_of
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules import one_f_one_b, paci
from tests.grids import calls, parsed, random_script


def counted(ops):
    """Drift per micro-batch, by counting the STEPs that stand between its F and its B."""
    drift = {}
    for at, op in enumerate(ops):
        if op.kind is OpKind.BACKWARD:
            born = ops.index(Op(OpKind.FORWARD, op.index))
            drift[op.index] = sum(other.kind is OpKind.STEP for other in ops[born:at])
    return drift


def between_drains(spec, stage, segments):
    """The compute ops of a stage, cut where its pipe was empty."""
    streams = []
    for segment in segments:
        if segment.start == 0:
            streams.append([])
        streams[-1].extend(segment.ops(stage))
    return streams


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("accumulation", range(1, 9))
@pytest.mark.parametrize("extra", [0, 2])
def test_counted_drift_is_the_closed_form(stages, accumulation, extra):
    spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
    segments = calls(spec, "tttdt" + random_script(17 * stages + accumulation, 8))
    for stage in range(stages):
        bound = drift_bound(spec, stage)
        for ops in between_drains(spec, stage, segments):
            drift = counted(ops)
            assert drift == {m: drift_of(spec, stage, m) for m in drift}
            assert max(drift.values()) <= bound
            meter = DriftMeter().record_all(ops)
            assert sorted(meter.histogram.elements()) == sorted(drift.values())
            assert meter.largest == max(drift.values())
            assert meter.in_flight == 0
            assert meter.version == len(drift) // accumulation


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("accumulation", range(1, 9))
def test_the_bound_is_reached_and_enough_accumulation_makes_it_one(stages, accumulation):
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    for stage in range(stages):
        ahead, bound = stages - 1 - stage, drift_bound(spec, stage)
        assert bound == (ahead + accumulation - 1) // accumulation
        assert max(counted(list(paci.stream(spec, stage, batches=2 + ahead))).values()) == bound
        if accumulation >= stages - 1:
            assert bound == (1 if ahead else 0)


@pytest.mark.parametrize(
    ("stages", "accumulation", "stage", "drift"),
    [
        (4, 1, 0, [0, 1, 2, 3, 3, 3]),
        (4, 2, 0, [0, 0, 1, 1, 2, 1, 2, 1]),
        (4, 2, 1, [0, 0, 1, 1, 1, 1]),
        (8, 3, 0, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 2, 2, 3, 2, 2, 3]),
        (3, 5, 0, [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0]),
        (3, 5, 2, [0] * 12),
    ],
)
def test_drift_of_the_first_micro_batches(stages, accumulation, stage, drift):
    """Counted by hand from the stream: micro-batches run ahead in the fill have seen no update."""
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    assert [drift_of(spec, stage, m) for m in range(len(drift))] == drift


def test_1f1b_has_no_drift():
    spec = PipelineSpec(stages=5, accumulation=3)
    for stage in range(5):
        assert set(counted(list(one_f_one_b.stream(spec, stage, batches=4))).values()) == {0}


def test_the_meter_counts_op_by_op():
    meter = DriftMeter()
    seen = [meter.record(op) for op in parsed("F0 F1 F2 B0 STEP0 F3 B1 STEP1 B2 B3")]
    assert [drift for drift in seen if drift is not None] == [0, 1, 2, 1]
    assert dict(meter.histogram) == {0: 1, 1: 2, 2: 1}
    assert (meter.version, meter.largest, meter.in_flight) == (2, 2, 0)


def test_the_meter_keeps_model_chunks_apart():
    meter = DriftMeter().record_all(parsed("F0 STEP0 F0.1 B0.1"))
    assert dict(meter.histogram) == {0: 1}
    assert meter.in_flight == 1

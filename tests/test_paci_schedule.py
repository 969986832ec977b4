"""PACI's stream, where calls cut it, and 1F1B beside it: golden grids, and both cuts against the stream itself."""

import pytest

from paci_schedule import PipelineSpec
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules import one_f_one_b, paci
from tests.grids import calls, compute_grid, parsed, random_script, text

LAGGING = {
    (1, 2): [
        ["F0 B0 F1 B1 STEP0"],
        ["F2 B2 F3 B3 STEP1"],
        [""],
    ],
    (2, 3): [
        ["F0 F1 B0 F2 B1", "F0 B0 F1 B1 F2 B2 STEP0"],
        ["F3 B2 STEP0 F4 B3 F5 B4", "F3 B3 F4 B4 F5 B5 STEP1"],
        ["B5 STEP1", ""],
    ],
    (3, 2): [
        ["F0 F1", "F0 F1 B0", "F0 B0 F1 B1 STEP0"],
        ["F2 B0 F3 B1 STEP0", "F2 B1 STEP0 F3 B2", "F2 B2 F3 B3 STEP1"],
        ["B2 B3 STEP1", "B3 STEP1", ""],
    ],
    (4, 1): [
        ["F0", "F0", "F0", "F0 B0 STEP0"],
        ["F1", "F1", "F1 B0 STEP0", "F1 B1 STEP1"],
        ["B0 STEP0 B1 STEP1", "B0 STEP0 B1 STEP1", "B1 STEP1", ""],
    ],
}

LEADING = {
    (3, 2): [
        ["F0 F1 F2 B0 F3 B1 STEP0", "F0 F1 B0 F2 B1 STEP0", "F0 B0 F1 B1 STEP0"],
        ["F4 B2 F5 B3 STEP1", "F3 B2 F4 B3 STEP1", "F2 B2 F3 B3 STEP1"],
        ["B4 B5 STEP2", "F5 B4 B5 STEP2", "F4 B4 F5 B5 STEP2"],
    ],
    (4, 1): [
        ["F0 F1 F2 B0 STEP0", "F0 F1 F2 B0 STEP0", "F0 F1 B0 STEP0", "F0 B0 STEP0"],
        ["B1 STEP1", "B1 STEP1", "F2 B1 STEP1", "F1 B1 STEP1"],
        ["B2 STEP2", "B2 STEP2", "B2 STEP2", "F2 B2 STEP2"],
    ],
}


def endless(spec, stage, micro_batches):
    """The stream as the design states it: fill, then F(n + d) B(n), a STEP after every a-th B, no F beyond the end."""
    ahead = spec.look_ahead(stage)
    ops = [Op(OpKind.FORWARD, m) for m in range(min(ahead, micro_batches))]
    for n in range(micro_batches):
        if n + ahead < micro_batches:
            ops.append(Op(OpKind.FORWARD, n + ahead))
        ops.append(Op(OpKind.BACKWARD, n))
        if (n + 1) % spec.accumulation == 0:
            ops.append(Op(OpKind.STEP, n // spec.accumulation))
    return ops


@pytest.mark.parametrize(("stages", "accumulation"), LAGGING)
def test_lagging_calls_and_drain_are_golden(stages, accumulation):
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    assert compute_grid(calls(spec, "tt")) == LAGGING[stages, accumulation]


@pytest.mark.parametrize(("stages", "accumulation"), LEADING)
def test_leading_calls_with_a_known_end_are_golden(stages, accumulation):
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    segments = [paci.lead_batch(spec, number * accumulation, last=3 * accumulation) for number in range(3)]
    assert compute_grid(segments) == LEADING[stages, accumulation]


def test_the_drawing_in_the_docstring_is_the_schedule():
    spec = PipelineSpec(stages=3, accumulation=2)
    drawn = [line.split()[2:] for line in paci.__doc__.splitlines() if line.lstrip().startswith("stage ")]
    for stage, words in enumerate(drawn):
        cells = list(words[: words.index("...")])
        made = [word for segment in calls(spec, "ttt")[:3] for word in text(segment.ops(stage)).split()]
        assert cells == ["S" if word.startswith("STEP") else word for word in made]


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("accumulation", range(1, 9))
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("batches", [1, 2, 5])
def test_lagging_calls_and_a_drain_are_the_endless_stream(stages, accumulation, extra, batches):
    spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
    segments = calls(spec, "t" * batches)
    for stage in range(stages):
        stream = endless(spec, stage, batches * accumulation)
        assert [op for segment in segments for op in segment.ops(stage)] == stream
        assert list(paci.stream(spec, stage, batches)) == stream


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("accumulation", range(1, 9))
@pytest.mark.parametrize("batches", [1, 2, 5])
def test_leading_calls_are_the_endless_stream(stages, accumulation, batches):
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    known_end = [paci.lead_batch(spec, number * accumulation, last=batches * accumulation) for number in range(batches)]
    open_end = [paci.lead_batch(spec, number * accumulation) for number in range(batches)]
    for stage in range(stages):
        made = [op for segment in known_end for op in segment.ops(stage)]
        assert made == endless(spec, stage, batches * accumulation)
        made = [op for segment in open_end for op in segment.ops(stage)]
        assert made == endless(spec, stage, 99 * accumulation)[: len(made)]
        assert made[-1] == Op(OpKind.STEP, batches - 1)


@pytest.mark.parametrize("seed", range(8))
def test_every_call_admits_exactly_a_micro_batches(seed):
    spec = PipelineSpec(stages=5, accumulation=3, extra_in_flight=seed % 3)
    script = random_script(seed, 12)
    for segment in calls(spec, script):
        for stage in range(spec.stages):
            forwards = sum(op.kind is OpKind.FORWARD for op in segment.ops(stage))
            assert forwards == (spec.accumulation if segment.admitted == segment.stop else 0)


@pytest.mark.parametrize(("stages", "accumulation", "extra"), [(1, 1, 0), (2, 7, 0), (5, 3, 0), (8, 2, 0), (5, 2, 4)])
def test_at_the_peak_one_more_micro_batch_than_the_look_ahead_is_live(stages, accumulation, extra):
    """Exactly d_s + 1 micro-batches are live at the peak; without extra that is 1F1B's P - s."""
    spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
    for stage in range(stages):
        live, peak = 0, 0
        for op in paci.stream(spec, stage, batches=9):
            live += (op.kind is OpKind.FORWARD) - (op.kind is OpKind.BACKWARD)
            peak = max(peak, live)
        assert live == 0
        assert peak == spec.in_flight(stage)
        if not extra:
            assert peak == stages - stage


FLUSH = [
    "F0 F1 F2 B0 F3 B1 B2 B3 STEP0   F4 F5 F6 B4 F7 B5 B6 B7 STEP1",
    "F0 F1 B0 F2 B1 F3 B2 B3 STEP0   F4 F5 B4 F6 B5 F7 B6 B7 STEP1",
    "F0 B0 F1 B1 F2 B2 F3 B3 STEP0   F4 B4 F5 B5 F6 B6 F7 B7 STEP1",
]


def test_1f1b_is_golden():
    spec = PipelineSpec(stages=3, accumulation=4)
    assert [list(one_f_one_b.stream(spec, stage, batches=2)) for stage in range(3)] == [parsed(line) for line in FLUSH]


@pytest.mark.parametrize("stages", [1, 2, 5, 8])
@pytest.mark.parametrize("accumulation", [1, 3, 8])
def test_1f1b_is_paci_drained_after_every_batch(stages, accumulation):
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    for stage in range(stages):
        drained = [text(segment.ops(stage)) for segment in calls(spec, "td")]
        assert " ".join(filter(None, drained)) == text(one_f_one_b.batch(spec).ops(stage))

"""Lowering: golden programs, and links that are quiet whenever the caller has control."""

import itertools

import pytest

from paci_schedule import PipelineSpec
from paci_schedule.lower import lower
from paci_schedule.ops import OpKind
from paci_schedule.schedules import one_f_one_b, paci
from paci_schedule.validate import check_segments
from tests.grids import calls, program_grid, random_script

# Two calls and the drain.  A gradient whose receiver takes it only in the next segment is deferred to its start: SG1 of
# stage 1 of two, made in call 0, is the first message of call 1, behind the receive that call 1 posts.
GOLDEN = {
    (1, 2): [
        ["F0 B0 F1 B1 STEP0"],
        ["F2 B2 F3 B3 STEP1"],
        [""],
    ],
    (2, 2): [
        ["F0 SA0 EG0 F1 SA1 RG0 B0",
         "EA0 RA0 F0 EA1 B0 SG0 RA1 F1 B1 STEP0"],
        ["EG1 F2 SA2 RG1 B1 STEP0 EG2 F3 SA3 RG2 B2",
         "EA2 SG1 RA2 F2 EA3 B2 SG2 RA3 F3 B3 STEP1"],
        ["EG3 RG3 B3 STEP1",
         "SG3"],
    ],
    (3, 2): [
        ["F0 SA0 F1 SA1",
         "EA0 EA1 RA0 F0 SA0 EG0 RA1 F1 SA1 RG0 B0",
         "EA0 RA0 F0 EA1 B0 SG0 RA1 F1 B1 STEP0"],
        ["EG0 F2 SA2 RG0 B0 EG1 F3 SA3 RG1 B1 STEP0",
         "EA2 SG0 EG1 RA2 F2 SA2 EA3 RG1 B1 SG1 STEP0 EG2 RA3 F3 SA3 RG2 B2",
         "EA2 SG1 RA2 F2 EA3 B2 SG2 RA3 F3 B3 STEP1"],
        ["EG2 EG3 RG2 B2 RG3 B3 STEP1",
         "EG3 SG2 RG3 B3 SG3 STEP1",
         "SG3"],
    ],
}

FLUSH = [
    "F0 SA0 F1 SA1 EG0 F2 SA2 EG1 RG0 B0 EG2 RG1 B1 RG2 B2 STEP0",
    "EA0 EA1 RA0 F0 SA0 EG0 RA1 F1 SA1 EA2 RG0 B0 SG0 EG1 RA2 F2 SA2 EG2 RG1 B1 SG1 RG2 B2 SG2 STEP0",
    "EA0 RA0 F0 EA1 B0 SG0 RA1 F1 EA2 B1 SG1 RA2 F2 B2 SG2 STEP0",
]

LEADING = [
    ["F0 SA0 EG0 F1 SA1 RG0 B0 STEP0",
     "EA0 RA0 F0 EA1 B0 SG0 STEP0 RA1"],
    ["EG1 F2 SA2 RG1 B1 STEP1",
     "F1 EA2 B1 SG1 STEP1 RA2"],
    ["EG2 RG2 B2 STEP2",
     "F2 B2 SG2 STEP2"],
]


@pytest.mark.parametrize(("stages", "accumulation"), GOLDEN)
def test_calls_and_drain_are_golden(stages, accumulation):
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    assert program_grid(calls(spec, "tt")) == GOLDEN[stages, accumulation]


def test_a_flushed_batch_is_golden():
    assert program_grid([one_f_one_b.batch(PipelineSpec(stages=3, accumulation=3))]) == [FLUSH]


def leading_calls(spec, count, end=None):
    return [paci.lead_batch(spec, number * spec.accumulation, end) for number in range(count)]


def test_leading_calls_are_golden():
    """Stage 1 takes the activation that stage 0 made ahead at the end of the call, and runs it in the next one."""
    assert program_grid(leading_calls(PipelineSpec(stages=2, accumulation=1), 3, end=3)) == LEADING


def indices(ops, kind):
    return [op.index for op in ops if op.kind is kind]


def assert_quiet_between(segments):
    """Within every segment: each posted receive is taken, each message sent is taken by its receiver, in order."""
    for segment in segments:
        programs = [list(lower(segment, stage)) for stage in range(segment.spec.stages)]
        for program in programs:
            for kinds in ((OpKind.EXPECT_ACTIVATION, OpKind.RECV_ACTIVATION),
                          (OpKind.EXPECT_GRADIENT, OpKind.RECV_GRADIENT)):
                assert indices(program, kinds[0]) == indices(program, kinds[1])
        for upper, lower_one in itertools.pairwise(programs):
            assert indices(upper, OpKind.SEND_ACTIVATION) == indices(lower_one, OpKind.RECV_ACTIVATION)
            assert indices(lower_one, OpKind.SEND_GRADIENT) == indices(upper, OpKind.RECV_GRADIENT)
        assert not indices(programs[0], OpKind.RECV_ACTIVATION)
        assert not indices(programs[0], OpKind.SEND_GRADIENT)
        assert not indices(programs[-1], OpKind.SEND_ACTIVATION)
        assert not indices(programs[-1], OpKind.RECV_GRADIENT)


def assert_complete(segments):
    """Every forward but the first stage's has its activation, every backward but the last stage's its gradient."""
    spec = segments[0].spec
    for stage in range(spec.stages):
        taken_early = []
        for segment in segments:
            program = list(lower(segment, stage))
            for at, op in enumerate(program):
                before = program[at - 1].kind if at else None
                if op.kind is OpKind.FORWARD and stage:
                    if op.index in taken_early:
                        taken_early.remove(op.index)
                    else:
                        assert (before, program[at - 1].index) == (OpKind.RECV_ACTIVATION, op.index)
                if op.kind is OpKind.BACKWARD and stage < spec.stages - 1:
                    assert (before, program[at - 1].index) == (OpKind.RECV_GRADIENT, op.index)
            assert [op for op in program if op.kind.is_compute] == list(segment.ops(stage))
            computed = indices(program, OpKind.FORWARD)
            taken_early += [index for index in indices(program, OpKind.RECV_ACTIVATION) if index not in computed]
            assert len(taken_early) <= (spec.gradients_on_wire(stage) if segment.leading else 0)


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("accumulation", [1, 2, 3, 7])
@pytest.mark.parametrize("extra", [0, 1, 4])
def test_nothing_is_on_the_wire_between_calls(stages, accumulation, extra):
    spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
    segments = calls(spec, "tttt" + random_script(stages * accumulation + extra, 9))
    assert_quiet_between(segments)
    assert_complete(segments)


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("accumulation", [1, 2, 3, 7])
@pytest.mark.parametrize("extra", [0, 1, 4])
def test_nothing_is_on_the_wire_between_leading_calls(stages, accumulation, extra):
    spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
    for segments in (leading_calls(spec, 5), leading_calls(spec, 5, end=5 * accumulation)):
        assert_quiet_between(segments)
        assert_complete(segments)


@pytest.mark.parametrize("stages", range(1, 13))
@pytest.mark.parametrize("accumulation", range(1, 7))
@pytest.mark.parametrize("extra", [0, 3])
def test_leading_calls_are_a_valid_schedule(stages, accumulation, extra):
    """Also with a known end in between, after which the pipe fills again."""
    spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
    check_segments(spec, leading_calls(spec, 3, end=3 * accumulation) + leading_calls(spec, 5, end=5 * accumulation))


@pytest.mark.parametrize("stages", [2, 5])
@pytest.mark.parametrize("extra", [0, 2])
def test_a_receive_is_posted_one_compute_op_early(stages, extra):
    """One F or B stands between the posting of a receive and the wait for it; none for the first op of a call."""
    spec = PipelineSpec(stages=stages, accumulation=3, extra_in_flight=extra)
    for segment in calls(spec, "ttt"):
        for stage in range(stages):
            program = list(lower(segment, stage))
            done, posted = 0, {}
            for op in program:
                if op.kind in (OpKind.FORWARD, OpKind.BACKWARD):
                    done += 1
                elif op.kind in (OpKind.EXPECT_ACTIVATION, OpKind.EXPECT_GRADIENT):
                    posted[op.kind.value[1], op.index] = done
                elif op.kind in (OpKind.RECV_ACTIVATION, OpKind.RECV_GRADIENT):
                    early = done - posted[op.kind.value[1], op.index]
                    assert early == (1 if done else 0)

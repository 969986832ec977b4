"""Lowering: golden programs, and links that are quiet whenever the caller has control."""

import itertools

import pytest

from paci_schedule import PipelineSpec
from paci_schedule.core.lower import Lowering
from paci_schedule.core.ops import OpKind
from paci_schedule.core.schedules import one_f_one_b
from paci_schedule.core.schedules.registry import schedule
from tests import golden
from tests.grids import calls, leading_calls, program_grid, programs, random_script, text
from tests.streams import check_segments

# Two calls and the drain.  The gradient of a stage's last round goes at the start of the next segment: SG1 of stage 1
# of two, made in call 0, is sent in call 1, whose first gap at stage 0 posts its receive.
GOLDEN = {
    (1, 2): [
        ["F0 B0 F1 B1 STEP0"],
        ["F2 B2 F3 B3 STEP1"],
        [""],
    ],
    (2, 2): [
        ["F0 SA0 F1 SA1 EG0 RG0 B0", "EA0 RA0 F0 EA1 B0 SG0 RA1 F1 B1 STEP0"],
        ["F2 SA2 EG1 RG1 B1 STEP0 F3 SA3 EG2 RG2 B2", "EA2 SG1 RA2 F2 EA3 B2 SG2 RA3 F3 B3 STEP1"],
        ["EG3 RG3 B3 STEP1", "SG3"],
    ],
    (3, 2): [
        ["F0 SA0 F1 SA1", "EA0 EA1 RA0 F0 SA0 RA1 F1 SA1 EG0 RG0 B0", "EA0 RA0 F0 EA1 B0 SG0 RA1 F1 B1 STEP0"],
        [
            "F2 SA2 EG0 RG0 B0 F3 SA3 EG1 RG1 B1 STEP0",
            "EA2 SG0 RA2 F2 SA2 EG1 EA3 RG1 B1 SG1 STEP0 RA3 F3 SA3 EG2 RG2 B2",
            "EA2 SG1 RA2 F2 EA3 B2 SG2 RA3 F3 B3 STEP1",
        ],
        ["EG2 RG2 B2 EG3 RG3 B3 STEP1", "SG2 EG3 RG3 B3 SG3 STEP1", "SG3"],
    ],
}

FLUSH = [
    "F0 SA0 F1 SA1 F2 SA2 EG0 RG0 B0 EG1 RG1 B1 EG2 RG2 B2 STEP0",
    "EA0 EA1 RA0 F0 SA0 RA1 F1 SA1 EG0 EA2 RG0 B0 SG0 RA2 F2 SA2 EG1 RG1 B1 SG1 EG2 RG2 B2 SG2 STEP0",
    "EA0 RA0 F0 EA1 B0 SG0 RA1 F1 EA2 B1 SG1 RA2 F2 B2 SG2 STEP0",
]

LEADING = [
    ["F0 SA0 F1 SA1 EG0 RG0 B0 STEP0", "EA0 RA0 F0 EA1 B0 SG0 STEP0 RA1"],
    ["F2 SA2 EG1 RG1 B1 STEP1", "F1 EA2 B1 SG1 STEP1 RA2"],
    ["EG2 RG2 B2 STEP2", "F2 B2 SG2 STEP2"],
]

# A round of slack on the first link: stage 0 posts EG1 with F3, where stage 1 sends it, and takes it with F4.
SLACK = [
    ["F0 SA0 F1 SA1", "EA0 EA1 RA0 F0 SA0 RA1 F1 SA1 EG0 RG0 B0", "EA0 RA0 F0 EA1 B0 SG0 RA1 F1 B1 STEP0"],
    [
        "F2 SA2 EG0 F3 SA3 EG1 RG0 B0",
        "EA2 SG0 RA2 F2 SA2 EG1 EA3 RG1 B1 SG1 STEP0 RA3 F3 SA3 EG2 RG2 B2",
        "EA2 SG1 RA2 F2 EA3 B2 SG2 RA3 F3 B3 STEP1",
    ],
    [
        "F4 SA4 EG2 RG1 B1 STEP0 F5 SA5 EG3 RG2 B2",
        "EA4 SG2 RA4 F4 SA4 EG3 EA5 RG3 B3 SG3 STEP1 RA5 F5 SA5 EG4 RG4 B4",
        "EA4 SG3 RA4 F4 EA5 B4 SG4 RA5 F5 B5 STEP2",
    ],
    ["EG4 RG3 B3 STEP1 EG5 RG4 B4 RG5 B5 STEP2", "SG4 EG5 RG5 B5 SG5 STEP2", "SG5"],
]

# Stage 0 shares one weight with stage 2, another one with stage 1.
TIED = [
    [
        "F2 SA2 EG0 RG0 B0 F3 SA3 EG1 RG1 B1 STEP0 SUM0 SUM0.1",
        "EA2 SG0 RA2 F2 SA2 EG1 EA3 RG1 B1 SG1 STEP0 RA3 F3 SA3 EG2 SUM0.1 RG2 B2",
        "EA2 SG1 RA2 F2 EA3 B2 SG2 SUM0 RA3 F3 B3 STEP1",
    ],
    ["EG2 RG2 B2 EG3 RG3 B3 STEP1 SUM1 SUM1.1", "SG2 EG3 RG3 B3 SG3 STEP1 SUM1.1", "SG3 SUM1"],
]

TIED_LEADING = [
    ["F0 SA0 F1 SA1 EG0 RG0 B0 STEP0", "EA0 RA0 F0 EA1 B0 SG0 STEP0 RA1"],
    ["SUM0 F2 SA2 EG1 RG1 B1 STEP1", "F1 SUM0 EA2 B1 SG1 STEP1 RA2"],
    ["SUM1 EG2 RG2 B2 STEP2 SUM2", "F2 SUM1 B2 SG2 STEP2 SUM2"],
]

# With the receives of gradients posted early as well.
EARLY = {
    (1, 2): [
        ["F0 B0 F1 B1 STEP0"],
        ["F2 B2 F3 B3 STEP1"],
        [""],
    ],
    (2, 2): [
        ["F0 SA0 EG0 F1 SA1 RG0 B0", "EA0 RA0 F0 EA1 B0 SG0 RA1 F1 B1 STEP0"],
        ["EG1 F2 SA2 RG1 B1 STEP0 EG2 F3 SA3 RG2 B2", "EA2 SG1 RA2 F2 EA3 B2 SG2 RA3 F3 B3 STEP1"],
        ["EG3 RG3 B3 STEP1", "SG3"],
    ],
    (3, 2): [
        ["F0 SA0 F1 SA1", "EA0 EA1 RA0 F0 SA0 EG0 RA1 F1 SA1 RG0 B0", "EA0 RA0 F0 EA1 B0 SG0 RA1 F1 B1 STEP0"],
        [
            "EG0 F2 SA2 RG0 B0 EG1 F3 SA3 RG1 B1 STEP0",
            "EA2 SG0 EG1 RA2 F2 SA2 EA3 RG1 B1 SG1 STEP0 EG2 RA3 F3 SA3 RG2 B2",
            "EA2 SG1 RA2 F2 EA3 B2 SG2 RA3 F3 B3 STEP1",
        ],
        ["EG2 EG3 RG2 B2 RG3 B3 STEP1", "EG3 SG2 RG3 B3 SG3 STEP1", "SG3"],
    ],
}

GPIPE = [
    "F0 SA0 F1 SA1 F2 SA2 EG2 RG2 B2 EG1 RG1 B1 EG0 RG0 B0 STEP0",
    "EA0 EA1 RA0 F0 SA0 EA2 RA1 F1 SA1 RA2 F2 SA2 EG2 RG2 B2 SG2 EG1 RG1 B1 SG1 EG0 RG0 B0 SG0 STEP0",
    "EA0 EA1 RA0 F0 EA2 RA1 F1 RA2 F2 B2 SG2 B1 SG1 B0 SG0 STEP0",
]

# The activation of a later F is posted before B, not before the W that follows it: the stage before sends it only then.
ZB_H1 = [
    "F0 SA0 F1 SA1 F2 SA2 EG0 RG0 B0 W0 EG1 RG1 B1 W1 EG2 RG2 B2 W2 STEP0",
    "EA0 EA1 RA0 F0 SA0 RA1 F1 SA1 EG0 EA2 RG0 B0 SG0 RA2 F2 SA2 EG1 RG1 B1 SG1 W0 EG2 RG2 B2 SG2 W1 W2 STEP0",
    "EA0 RA0 F0 EA1 B0 SG0 RA1 F1 EA2 B1 SG1 RA2 F2 B2 SG2 W0 W1 W2 STEP0",
]

EARLY_FLUSH = [
    "F0 SA0 F1 SA1 EG0 F2 SA2 EG1 RG0 B0 EG2 RG1 B1 RG2 B2 STEP0",
    "EA0 EA1 RA0 F0 SA0 EG0 RA1 F1 SA1 EA2 RG0 B0 SG0 EG1 RA2 F2 SA2 EG2 RG1 B1 SG1 RG2 B2 SG2 STEP0",
    "EA0 RA0 F0 EA1 B0 SG0 RA1 F1 EA2 B1 SG1 RA2 F2 B2 SG2 STEP0",
]

EARLY_LEADING = [
    ["F0 SA0 EG0 F1 SA1 RG0 B0 STEP0", "EA0 RA0 F0 EA1 B0 SG0 STEP0 RA1"],
    ["EG1 F2 SA2 RG1 B1 STEP1", "F1 EA2 B1 SG1 STEP1 RA2"],
    ["EG2 RG2 B2 STEP2", "F2 B2 SG2 STEP2"],
]


@pytest.mark.parametrize(("stages", "accumulation"), GOLDEN)
@pytest.mark.parametrize(("early", "golden"), [(False, GOLDEN), (True, EARLY)], ids=["default", "early"])
def test_calls_and_drain_are_golden(stages, accumulation, early, golden):
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    assert program_grid(calls(spec, "tt"), early_receives=early) == golden[stages, accumulation]


@pytest.mark.parametrize(("early", "golden"), [(False, FLUSH), (True, EARLY_FLUSH)], ids=["default", "early"])
def test_a_flushed_batch_is_golden(early, golden):
    segments = [one_f_one_b.batch(PipelineSpec(stages=3, accumulation=3))]
    assert program_grid(segments, early_receives=early) == [golden]


@pytest.mark.parametrize(("name", "expected"), [("gpipe", GPIPE), ("zb-h1", ZB_H1), ("1f1b", FLUSH)])
def test_a_batch_of_any_schedule_gets_its_messages(name, expected):
    spec = PipelineSpec(stages=3, accumulation=3)
    batch = schedule(name).call(spec)
    assert [text(Lowering(schedule(name), spec, stage).program(batch)) for stage in range(3)] == expected


@pytest.mark.parametrize(("early", "golden"), [(False, LEADING), (True, EARLY_LEADING)], ids=["default", "early"])
def test_leading_calls_are_golden(early, golden):
    """Stage 1 takes the activation that stage 0 made ahead at the end of the call, and runs it in the next one."""
    segments = leading_calls(PipelineSpec(stages=2, accumulation=1), 3, end=3)
    assert program_grid(segments, early_receives=early) == golden


def test_calls_with_slack_are_golden():
    assert program_grid(calls(PipelineSpec(stages=3, accumulation=2, extra_in_flight=(1, 0)), "ttt")) == SLACK


def test_sums_of_tied_weights_are_golden():
    assert program_grid(calls(PipelineSpec(stages=3, accumulation=2), "tt"), ties=[(0, 2), (0, 1)])[1:] == TIED


def test_sums_of_tied_weights_are_golden_in_leading_calls():
    """The update of a call follows it, so its sum is posted in the next one; that of the last call at its end."""
    segments = leading_calls(PipelineSpec(stages=2, accumulation=1), 3, end=3)
    assert program_grid(segments, ties=[(0, 1)]) == TIED_LEADING


def test_programs_are_those_of_the_golden_file():
    kept = golden.FILE.read_text().splitlines()
    for number, (found, line) in enumerate(itertools.zip_longest(golden.lines(), kept), start=1):
        assert found == line, f"line {number} of {golden.FILE.name}"


def indices(ops, kind):
    return [op.index for op in ops if op.kind is kind]


def assert_quiet_between(segments, ties=(), early=False):
    """Within every segment: for each message sent its receive is posted, in order; each sum is posted by all holders.

    All are taken by the time that the pipe is empty; gradients within the segment, but for slack.
    """
    held = [[] for _ in range(segments[0].spec.stages)]
    stages = range(segments[0].spec.stages)
    made = [programs(segments, stage, ties=ties, early_receives=early) for stage in stages]
    for segment, *of_stages in zip(segments, *made, strict=True):
        for stage, program in enumerate(of_stages):
            assert indices(program, OpKind.EXPECT_ACTIVATION) == indices(program, OpKind.RECV_ACTIVATION)
            held[stage] += indices(program, OpKind.EXPECT_GRADIENT)
            taken = indices(program, OpKind.RECV_GRADIENT)
            assert held[stage][: len(taken)] == taken
            del held[stage][: len(taken)]
            if stage < segment.spec.stages - 1:
                assert len(held[stage]) <= segment.spec.gradients_on_wire(stage + 1) - 1
        for upper, lower_one in itertools.pairwise(of_stages):
            assert indices(upper, OpKind.SEND_ACTIVATION) == indices(lower_one, OpKind.EXPECT_ACTIVATION)
            assert indices(lower_one, OpKind.SEND_GRADIENT) == indices(upper, OpKind.EXPECT_GRADIENT)
        for number, holders in enumerate(ties):
            sums = [
                [op for op in of_stages[stage] if op.kind is OpKind.SUM and op.chunk == number] for stage in holders
            ]
            assert all(posted == sums[0] for posted in sums)
        assert not indices(of_stages[0], OpKind.RECV_ACTIVATION)
        assert not indices(of_stages[0], OpKind.SEND_GRADIENT)
        assert not indices(of_stages[-1], OpKind.SEND_ACTIVATION)
        assert not indices(of_stages[-1], OpKind.RECV_GRADIENT)
    if segments[-1].admitted <= segments[-1].stop:
        assert not any(held)


def assert_complete(segments):
    """Every forward but the first stage's has its activation, every backward but the last stage's its gradient."""
    spec = segments[0].spec
    for stage in range(spec.stages):
        taken_early = []
        for segment, program in zip(segments, programs(segments, stage), strict=True):
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


@pytest.mark.parametrize("stages", range(2, 9))
@pytest.mark.parametrize("accumulation", [1, 2, 3, 7])
@pytest.mark.parametrize("extra", [0, 1, 4])
def test_every_update_s_sum_is_posted_once_after_it_and_before_the_step_that_applies_it(stages, accumulation, extra):
    spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
    ties = [(0, stages - 1), tuple(range(stages)), (stages // 2, stages - 1)]
    count = 3 + spec.look_ahead(0) // accumulation
    for segments in (calls(spec, "t" * count), leading_calls(spec, count, end=count * accumulation)):
        assert_quiet_between(segments, ties)
        for number, holders in enumerate(ties):
            delay = -(-(spec.look_ahead(holders[0]) - spec.look_ahead(holders[-1])) // accumulation)
            for stage in holders:
                ops = list(itertools.chain(*programs(segments, stage, ties=ties)))
                posted = [at for at, op in enumerate(ops) if op.kind is OpKind.SUM and op.chunk == number]
                steps = [at for at, op in enumerate(ops) if op.kind is OpKind.STEP]
                assert [ops[at].index for at in posted] == list(range(count))
                for update, at in enumerate(posted):
                    assert steps[update] < at
                    assert update + delay >= count or not delay or at < steps[update + delay]


@pytest.mark.parametrize("stages", [2, 5])
@pytest.mark.parametrize("early", [False, True])
def test_receives_are_posted_as_early_as_stated(stages, early):
    """One F or B stands between the posting of a receive and the wait for it, none for the first op of a call; none
    at all for gradients unless they are early, too."""
    spec = PipelineSpec(stages=stages, accumulation=3)
    for stage in range(stages):
        for program in programs(calls(spec, "ttt"), stage, early_receives=early):
            done, posted = 0, {}
            for op in program:
                if op.kind in (OpKind.FORWARD, OpKind.BACKWARD):
                    done += 1
                elif op.kind in (OpKind.EXPECT_ACTIVATION, OpKind.EXPECT_GRADIENT):
                    posted[op.kind.value[1], op.index] = done
                elif op.kind in (OpKind.RECV_ACTIVATION, OpKind.RECV_GRADIENT):
                    ahead = done - posted[op.kind.value[1], op.index]
                    assert ahead == (1 if done and (early or op.kind is OpKind.RECV_ACTIVATION) else 0)


@pytest.mark.parametrize("slack", [0, 1, 3])
def test_the_receive_of_a_gradient_is_posted_where_it_is_sent(slack):
    """In the round after the one whose B makes it, in the same gap: right after the activation of that round."""
    spec = PipelineSpec(stages=3, accumulation=4, extra_in_flight=(slack, slack))
    for stage in range(2):
        for program in programs(calls(spec, "tttt")[:-1], stage):
            for op, following in itertools.pairwise(program):
                if op.kind is OpKind.SEND_ACTIVATION and following.kind is OpKind.EXPECT_GRADIENT:
                    assert op.index - following.index == spec.look_ahead(stage + 1) + 1
                else:
                    assert following.kind is not OpKind.EXPECT_GRADIENT

"""The validator: accepts every sequence of calls and drains, and names the op that breaks a mutilated schedule."""

import itertools
import random
import re

import pytest

from paci_schedule import PipelineSpec, ScheduleError
from paci_schedule.check.rendezvous import ALWAYS, NEVER, Synchronising, check_rendezvous
from paci_schedule.check.validate import check_messages
from paci_schedule.core.ops import OpKind
from paci_schedule.core.schedules import one_f_one_b, paci
from paci_schedule.core.schedules.registry import SCHEDULES, schedule
from tests.grids import calls, leading_calls, parsed, programs, random_script, text
from tests.streams import check_segments, check_stream

# ---- valid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 8, 13, 16, 32])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 7, 8, 16])
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_any_sequence_of_calls_and_drains_is_valid(stages, accumulation, extra):
    spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
    check_segments(spec, calls(spec, "tt" + random_script(31 * stages + accumulation, 5)))


@pytest.mark.slow
@pytest.mark.parametrize("stages", range(1, 33))
@pytest.mark.parametrize("extra", [0, 1, 2, 5, 11])
def test_the_full_product_is_valid(stages, extra):
    for accumulation in range(1, 17):
        spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
        enough_to_fill = "t" * (2 + -(-(stages + extra) // accumulation))
        for seed in range(3):
            check_segments(spec, calls(spec, enough_to_fill + random_script(seed, 9)))


@pytest.mark.parametrize("stages", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("accumulation", [1, 3, 16])
def test_flushed_batches_are_valid(stages, accumulation):
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    check_segments(spec, [one_f_one_b.batch(spec)] * 3)


@pytest.mark.parametrize("stages", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("accumulation", [1, 3, 16])
def test_leading_calls_are_valid(stages, accumulation):
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    end = (stages + 3) * accumulation
    check_segments(spec, [paci.lead_batch(spec, start, last=end) for start in range(0, end, accumulation)])


# ---- one stage's stream mutilated -----------------------------------------------------------------------------------

SPEC = PipelineSpec(stages=4, accumulation=3)
STREAMS = [list(paci.stream(SPEC, stage, batches=3)) for stage in range(4)]


def shown_op(message):
    """The op between >...<, the one that the message points at."""
    marked = re.findall(r">(\S+)<", message)
    assert len(marked) == 1, message
    return marked[0]


def assert_refused(stage, ops):
    """The stream is refused: the message names the stage, an op, and shows the row with the op marked."""
    with pytest.raises(ScheduleError) as caught:
        check_stream(SPEC, stage, ops)
    message = str(caught.value)
    assert message.startswith(f"stage {stage}: ")
    assert shown_op(message) in map(str, ops)
    return message


def swaps_that_change_nothing(first, second):
    """F(i) B(j) of two micro-batches done the other way round: no STEP crossed, one micro-batch less in flight."""
    return first.kind is OpKind.FORWARD and second.kind is OpKind.BACKWARD and first.index != second.index


@pytest.mark.parametrize("stage", range(4))
def test_every_swap_of_neighbours_is_caught(stage):
    ops = STREAMS[stage]
    for at in range(len(ops) - 1):
        swapped = [*ops[:at], ops[at + 1], ops[at], *ops[at + 2 :]]
        if swaps_that_change_nothing(ops[at], ops[at + 1]):
            check_stream(SPEC, stage, swapped)
        else:
            assert_refused(stage, swapped)


@pytest.mark.parametrize("stage", range(4))
def test_every_missing_op_is_caught(stage):
    ops = STREAMS[stage]
    for at, op in enumerate(ops[:-1]):
        message = assert_refused(stage, ops[:at] + ops[at + 1 :])
        if op.kind is OpKind.STEP:
            assert f"before {op}: a step belongs after every 3-th backward" in message


@pytest.mark.parametrize("stage", range(4))
def test_a_missing_last_step_is_caught(stage):
    assert STREAMS[stage][-1].kind is OpKind.STEP
    assert_refused(stage, STREAMS[stage][:-1])


@pytest.mark.parametrize("stage", range(4))
def test_every_doubled_op_is_caught(stage):
    ops = STREAMS[stage]
    for at in range(len(ops)):
        assert_refused(stage, [*ops[:at], ops[at], *ops[at:]])


@pytest.mark.parametrize(
    ("stage", "line", "op", "rule"),
    [
        (3, "F0 F2 B0", "F2", "F2 where F1 is next"),
        (3, "F0 B1", "B1", "B1 where B0 is next and 1 forwards are done"),
        (3, "B0", "B0", "B0 where B0 is next and 0 forwards are done"),
        (3, "F0 B0 STEP0", "STEP0", "STEP0 after 1 backwards, with 3 to an update"),
        (3, "F0 F1", "F1", "2 micro-batches in flight, at most 1 allowed"),
        (0, "F0 F1 F2 F3 F4", "F4", "5 micro-batches in flight, at most 4 allowed"),
        (2, "F0 B0 F1 B1 F2 B2 STEP0 F3", "F3", "4 forwards but 3 backwards"),
        (2, "F0 B0 F1 B1 F2 B2 STEP0 F3 B3 F4", "B3", "drift 0 at B3, closed form 1, bound 1"),
        (2, "F0 SA0", "SA0", "SA0 is not a compute op of this schedule"),
    ],
)
def test_the_message_names_op_and_rule(stage, line, op, rule):
    with pytest.raises(ScheduleError) as caught:
        check_stream(SPEC, stage, parsed(line))
    message = str(caught.value)
    assert rule in message
    assert shown_op(message) == op


def test_check_segments_names_the_stage():
    segments = calls(SPEC, "tt")
    with pytest.raises(ScheduleError, match=r"(?s)^stage 0: 6 forwards but 3 backwards.*>\S+<"):
        check_segments(SPEC, segments[:-1])


# ---- the links between stages ---------------------------------------------------------------------------------------


def marked(message):
    """stage -> op between >...< in the grid of a message."""
    rows = re.findall(r"^  stage (\d+) .*?>(\S+)<", message, flags=re.MULTILINE)
    return {int(stage): op for stage, op in rows}


def test_a_blocking_gradient_send_before_the_receive_is_posted_deadlocks():
    """Receives posted only when needed, sends blocking: stage 1 sits in SG0, so it never posts the receive of SA1."""
    programs = [
        parsed("F0 SA0 F1 SA1 EG0 RG0 B0 EG1 RG1 B1 STEP0"),
        parsed("EA0 RA0 F0 B0 SG0 EA1 RA1 F1 B1 SG1 STEP0"),
    ]
    with pytest.raises(ScheduleError) as caught:
        check_rendezvous(programs, [0, 1])
    message = str(caught.value)
    assert message.startswith("deadlock")
    assert marked(message) == {0: "SA1", 1: "SG0"}
    check_rendezvous([parsed("F0 SA0 EG0 F1 SA1 RG0 B0 EG1 RG1 B1 STEP0"), programs[1]], [0, 1])


@pytest.mark.parametrize(("stages", "accumulation"), [(2, 2), (3, 3), (5, 2), (16, 16)])
def test_receives_posted_late_deadlock_at_any_size(stages, accumulation):
    """Every EA and EG moved behind, to right before its wait."""
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    late = []
    for stage in range(stages):
        words = text(itertools.chain(*programs(calls(spec, "tt"), stage))).split()
        late.append(parsed(" ".join(re.sub("^R", f"E{word[1:]} R", word) for word in words if word[0] != "E")))
    with pytest.raises(ScheduleError, match="deadlock"):
        check_rendezvous(late, [spec.gradients_on_wire(stage) for stage in range(stages)])


def programs_of(spec, script):
    return [list(itertools.chain(*programs(calls(spec, script), stage))) for stage in range(spec.stages)]


LINKED = [PipelineSpec(stages=3, accumulation=2), PipelineSpec(stages=3, accumulation=2, extra_in_flight=3)]
LINKED_IDS = ["stages=3", "stages=3, extra_in_flight=3"]


def refusal(spec, programs):
    """The message with which the programs are refused; it shows the grid."""
    with pytest.raises(ScheduleError) as caught:
        check_rendezvous(programs, [spec.gradients_on_wire(stage) for stage in range(spec.stages)])
    message = str(caught.value)
    assert re.findall(r"^  stage (\d+) ", message, flags=re.MULTILINE) == [str(stage) for stage in range(spec.stages)]
    return message


def without(programs, stage, at):
    """The programs without one op."""
    return [ops if which != stage else ops[:at] + ops[at + 1 :] for which, ops in enumerate(programs)]


@pytest.mark.parametrize("spec", LINKED, ids=LINKED_IDS)
def test_every_dropped_message_op_is_caught(spec):
    programs = programs_of(spec, "tttdt")
    for stage, ops in enumerate(programs):
        for at, op in enumerate(ops):
            if not op.kind.is_compute:
                message = refusal(spec, without(programs, stage, at))
                assert marked(message), f"without {op} of stage {stage} no op is marked:\n{message}"


@pytest.mark.parametrize("spec", LINKED, ids=LINKED_IDS)
@pytest.mark.parametrize("direction", ["A", "G"])
def test_every_message_that_nobody_takes_is_caught(spec, direction):
    """A message whose receiver neither expects nor takes it."""
    programs = programs_of(spec, "tttdt")
    for stage, ops in enumerate(programs):
        for at, op in enumerate(ops):
            if str(op).startswith("R" + direction):
                expect = parsed("E" + str(op)[1:])[0]
                posted = max(where for where in range(at) if ops[where] == expect)
                mutilated = without(without(programs, stage, at), stage, posted)
                assert marked(refusal(spec, mutilated)), f"without {expect} and {op} of stage {stage} no op is marked"


@pytest.mark.parametrize("spec", LINKED, ids=LINKED_IDS)
def test_every_message_sent_out_of_order_is_caught(spec):
    """Two sends of one link exchanged: the first of them is what the message names."""
    programs = programs_of(spec, "tttdt")
    for stage, ops in enumerate(programs):
        for kind in (OpKind.SEND_ACTIVATION, OpKind.SEND_GRADIENT):
            sends = [at for at, op in enumerate(ops) if op.kind is kind]
            for first, second in itertools.pairwise(sends):
                if ops[first].index == ops[second].index:
                    continue
                mutilated = [list(program) for program in programs]
                mutilated[stage][first], mutilated[stage][second] = ops[second], ops[first]
                message = refusal(spec, mutilated)
                receive = text([ops[first]]).replace("S", "R", 1)
                assert f"takes {receive} where {ops[second].index} was sent" in message
                assert receive in marked(message).values()


# ---- stages that wait for their device ------------------------------------------------------------------------------

COMPUTE = frozenset(kind for kind in OpKind if kind.is_compute)
WAITS = {
    "F": Synchronising(kinds=frozenset({OpKind.FORWARD})),
    "B": Synchronising(kinds=frozenset({OpKind.BACKWARD})),
    "STEP": Synchronising(kinds=frozenset({OpKind.STEP})),
    "compute": Synchronising(kinds=COMPUTE),
    "between calls": Synchronising(between_calls=True),
    "compute, between calls": Synchronising(kinds=COMPUTE, between_calls=True),
    "launch blocking": ALWAYS,
}


def ties_of(stages):
    """No tied weight; one of the first and the last stage; several, one of them of three stages."""
    yield ()
    if stages > 1:
        yield ((0, stages - 1),)
    if stages > 3:
        yield ((stages // 2, stages - 1), (0, stages // 2, stages - 1), (1, 2), (0, 1))


def slacks_of(stages, seed):
    """None; some for all links together; some for each."""
    return 0, 1, stages, tuple(random.Random(seed).choices((0, 0, 1, 2), k=stages - 1))


def runs(spec, seed):
    """Calls that fill the pipe, then any; under either cut."""
    fill = 2 + -(-spec.look_ahead(0) // spec.accumulation)
    yield calls(spec, "t" * fill + random_script(seed, 5))
    yield leading_calls(spec, 2, end=2 * spec.accumulation) + leading_calls(spec, fill, end=fill * spec.accumulation)


@pytest.mark.parametrize("waits", WAITS)
@pytest.mark.parametrize("stages", [2, 3, 4, 7])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_stages_that_wait_for_their_device_do_not_deadlock(stages, accumulation, waits):
    for extra in slacks_of(stages, accumulation):
        spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
        for segments, ties in itertools.product(runs(spec, stages), ties_of(stages)):
            check_messages(paci.Paci(), spec, segments, ties=ties, synchronising=WAITS[waits])


@pytest.mark.parametrize("waits", ["compute", "between calls", "launch blocking"])
@pytest.mark.parametrize("stages", [2, 5])
def test_one_stage_that_waits_for_its_device_does_not_deadlock(stages, waits):
    for accumulation, extra in itertools.product([1, 3], slacks_of(stages, 0)):
        spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
        for segments, ties, stage in itertools.product(runs(spec, 7), ties_of(stages), range(stages)):
            one = Synchronising(
                kinds=WAITS[waits].kinds, between_calls=WAITS[waits].between_calls, stages=frozenset({stage})
            )
            check_messages(paci.Paci(), spec, segments, ties=ties, synchronising=one)


RUNNABLE = [name for name in SCHEDULES if not schedule(name).cannot_run]


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("stages", range(1, 10))
def test_the_messages_of_every_schedule_that_engines_run_never_wait_in_a_circle(name, stages):
    """Even where every launch blocks, and with posted receives of gradients where no op waits for its device."""
    for accumulation in (1, 2, 3, stages, 2 * stages + 1):
        spec = PipelineSpec(stages=stages, accumulation=accumulation)
        made = list(schedule(name).run(spec, 3))
        check_messages(schedule(name), spec, made)
        check_messages(schedule(name), spec, made, early_receives=True, synchronising=NEVER)


@pytest.mark.parametrize("accumulation", [1, 3, 16])
def test_many_stages_that_wait_for_their_device_do_not_deadlock(accumulation):
    spec = PipelineSpec(stages=32, accumulation=accumulation)
    segments = next(runs(spec, 3))
    check_messages(paci.Paci(), spec, segments, ties=((0, 31), (5, 16, 31)), synchronising=ALWAYS)


@pytest.mark.slow
@pytest.mark.parametrize("stages", range(1, 33))
def test_the_full_product_does_not_deadlock(stages):
    """Launch blocking, and between calls too: what waits for its device less often finishes whenever this does."""
    for accumulation in range(1, 17):
        for extra in slacks_of(stages, accumulation):
            spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
            for segments, ties in itertools.product(runs(spec, stages + accumulation), ties_of(stages)):
                check_messages(paci.Paci(), spec, segments, ties=ties, synchronising=ALWAYS)


@pytest.mark.parametrize("waits", ["compute", "launch blocking"])
@pytest.mark.parametrize(("stages", "accumulation"), [(2, 4), (4, 8), (8, 3)])
def test_gradients_received_early_deadlock_where_ops_wait_for_the_device(stages, accumulation, waits):
    """F(i) waits for the gradient that the next stage makes only behind its wait for the activation of i."""
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    segments = next(runs(spec, 1))
    check_messages(paci.Paci(), spec, segments, early_receives=True, synchronising=NEVER)
    with pytest.raises(ScheduleError, match=r"(?s)^deadlock: .* or for its own device, at the marked op.*>\S+<"):
        check_messages(paci.Paci(), spec, segments, early_receives=True, synchronising=WAITS[waits])


@pytest.mark.parametrize(("stages", "accumulation"), [(2, 1), (2, 4), (4, 8), (8, 3)])
def test_a_sum_posted_with_the_last_stage_s_own_update_deadlocks_between_calls(stages, accumulation):
    """It needs the first stage's update, which comes a call later; so even if the last stage alone waits."""
    spec = PipelineSpec(stages=stages, accumulation=accumulation)
    segments, ties, last = next(runs(spec, 1)), ((0, stages - 1),), stages - 1
    moved, ends = [[] for _ in range(stages)], [[] for _ in range(stages)]
    for stage in range(stages):
        for program in programs(segments, stage, ties=ties):
            for op in program:
                if stage < last or op.kind is not OpKind.SUM:
                    moved[stage].append(op)
                if stage == last and op.kind is OpKind.STEP:
                    moved[stage].append(op._replace(kind=OpKind.SUM))
            ends[stage].append(len(moved[stage]))
    wires = [spec.gradients_on_wire(stage) for stage in range(stages)]
    check_rendezvous(moved, wires)
    between = Synchronising(between_calls=True, stages=frozenset({last}))
    with pytest.raises(ScheduleError, match=r"^deadlock"):
        check_rendezvous(moved, wires, between, ends)


def test_a_sum_that_not_all_post_is_caught():
    check_rendezvous([parsed("F0 B0 STEP0 SUM0 SUM0.1"), parsed("SUM0")], [0, 1])
    with pytest.raises(ScheduleError, match=r"tied weight 0 end with other numbers of postings: stage 0 1, stage 1 2"):
        check_rendezvous([parsed("F0 B0 STEP0 SUM0 SUM0.1"), parsed("SUM0 SUM1")], [0, 1])


def test_a_posted_receive_waits_for_itself_only_where_launches_block():
    """Both ends post before they send, which nobody minds who does not wait for the posting."""
    programs = [parsed("EG0 SA0 RG0"), parsed("EA0 SG0 RA0")]
    check_rendezvous(programs, [0, 1])
    check_rendezvous(programs, [0, 1], Synchronising(kinds=frozenset({OpKind.EXPECT_GRADIENT})))
    with pytest.raises(ScheduleError, match=r"^deadlock"):
        check_rendezvous(programs, [0, 1], ALWAYS)

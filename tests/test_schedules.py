"""Every schedule: its drawn grids, its ops, its validity over a sweep, and what the validator refuses."""

import importlib

import pytest

from paci_schedule import ConfigError, PipelineSpec, ScheduleError
from paci_schedule.check.validate import check_grid, check_schedule
from paci_schedule.core import grid
from paci_schedule.core.drift import DriftMeter
from paci_schedule.core.schedules.base import weave
from paci_schedule.core.schedules.registry import SCHEDULES, schedule
from paci_schedule.draw.text import text
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.execute import simulate


def drawn(name, stages, micro_batches, costs, batches=1, **options):
    spec = PipelineSpec(stages=stages, accumulation=micro_batches)
    return [
        line.rstrip() for line in text(simulate(schedule(name, **options), spec, costs, batches)).plain.splitlines()
    ]


# ---- golden grids with unequal costs: a swapped term moves a cell ---------------------------------------------------


def test_gpipe_with_unequal_costs():
    # F = 1, B = 3: stage 1 runs its backwards last-in first-out right away, stage 0 waits for each of them
    assert drawn("gpipe", 2, 3, Costs(forward=1.0, backward=3.0)) == [
        "stage 0   F0 F1 F2 .  .  .  .  B2------ B1------ B0------|",
        "stage 1   .  F0 F1 F2 B2------ B1------ B0------|",
    ]


def test_1f1b_with_unequal_costs():
    assert drawn("1f1b", 3, 4, Costs(forward=2.0, backward=3.0, step=1.0)) == [
        "stage 0   F0--------- F1--------- F2--------- .     .     .     .     .     .     "
        "B0--------------- F3--------- B1--------------- .     .     B2--------------- .     .     B3--------------- "
        "STEP0",
        "stage 1   .     .     F0--------- F1--------- .     .     .     B0--------------- F2--------- "
        "B1--------------- F3--------- B2--------------- .     .     B3--------------- STEP0",
        "stage 2   .     .     .     .     F0--------- B0--------------- F1--------- B1--------------- F2--------- "
        "B2--------------- F3--------- B3--------------- STEP0",
    ]


def test_zb_h1_with_unequal_costs():
    # F = 3, B = 2, W = 1
    assert drawn("zb-h1", 2, 3, Costs(forward=3.0, backward=2.0, weight=1.0)) == [
        "stage 0   F0------ F1------ .  .  B0--- W0 F2------ B1--- W1 .  .  B2--- W2|",
        "stage 1   .  .  .  F0------ B0--- F1------ B1--- W0 F2------ B2--- W1 W2|",
    ]


def test_zb_h2_with_unequal_costs():
    assert drawn("zb-h2", 2, 4, Costs(forward=3.0, backward=2.0, weight=1.0)) == [
        "stage 0   F0------ F1------ F2------ B0--- W0 F3------ B1--- W1 B2--- W2 .  .  .  B3--- W3|",
        "stage 1   .  .  .  F0------ B0--- F1------ B1--- F2------ B2--- W0 F3------ B3--- W1 W2 W3|",
    ]


def test_paci_with_unequal_costs_and_a_step():
    # F = 1, B = 2, S = 1, a = 2; no gap between the first B and the last F
    assert drawn("paci", 2, 2, Costs(forward=1.0, backward=2.0, step=1.0), batches=3) == [
        "stage 0   F0    F1    .     .     B0--------- F2    B1--------- STEP0 F3    B2--------- F4    B3--------- "
        "STEP1 F5    B4--------- .     B5--------- STEP2",
        "stage 1   .     F0    B0--------- F1    B1--------- STEP0 F2    B2--------- F3    B3--------- STEP1 F4    "
        "B4--------- F5    B5--------- STEP2",
    ]


def test_zb_h1_with_a_long_w():
    # F = 2, B = 3, W = 5: W stands where the next F would have been early
    assert drawn("zb-h1", 3, 4, Costs(forward=2.0, backward=3.0, weight=5.0)) == [
        "stage 0   F0--- F1--- F2--- .  .  .  .  .  .  B0------ W0------------ F3--- B1------ W1------------ "
        "B2------ W2------------ B3------ W3------------|",
        "stage 1   .  .  F0--- F1--- .  .  .  B0------ F2--- B1------ W0------------ F3--- B2------ W1------------ "
        "B3------ W2------------ W3------------|",
        "stage 2   .  .  .  .  F0--- B0------ F1--- B1------ F2--- B2------ W0------------ F3--- B3------ "
        "W1------------ W2------------ W3------------|",
    ]


def test_zb_v_with_unequal_costs():
    # F = 3, B = 2, W = 1 of a chunk
    assert drawn("zb-v", 2, 3, Costs(forward=6.0, backward=4.0, weight=2.0)) == [
        "stage 0   F0------------ F1------------ F2------------ F0.1---------- B0.1----- W0.1 F1.1---------- "
        "B1.1----- W1.1 .    .    B0------- W0   .    F2.1---------- B2.1----- W2.1 B1------- W1   B2------- W2  |",
        "stage 1   .    .    .    F0------------ F0.1---------- F1------------ F1.1---------- B0.1----- W0.1 "
        "F2------------ B0------- W0   F2.1---------- B1.1----- W1.1 B1------- B2.1----- B2------- W1   W2.1 W2  |",
    ]


def test_interleaved_with_unequal_costs():
    # F = 1, B = 2 of a chunk
    assert drawn("interleaved-1f1b", 2, 2, Costs(forward=2.0, backward=4.0)) == [
        "stage 0   F0   F1   F0.1 F1.1 .    .    B0.1----- .    B1.1----- B0------- B1-------|",
        "stage 1   .    F0   F1   F0.1 B0.1----- F1.1 B1.1----- B0------- B1-------|",
    ]


def test_pipedream_with_unequal_costs():
    assert drawn("pipedream", 2, 3, Costs(forward=1.0, backward=2.0, step=1.0)) == [
        "stage 0   F0    F1    .     .     B0--------- STEP0 F2    B1--------- STEP1 .     B2--------- STEP2",
        "stage 1   .     F0    B0--------- STEP0 F1    B1--------- STEP1 F2    B2--------- STEP2",
    ]


def test_pipedream_2bw_is_pacis_stream_with_a_second_version():
    spec = PipelineSpec(stages=4, accumulation=5)
    ours, theirs = schedule("paci"), schedule("pipedream-2bw")
    for stage in range(4):
        assert list(ours.stream(spec, stage, 3)) == list(theirs.stream(spec, stage, 3))
        assert (ours.weight_versions(spec, stage), theirs.weight_versions(spec, stage)) == (1, 2)


# ---- the grids in the docstrings are the schedules' own -------------------------------------------------------------

EQUAL, SPLIT = Costs(forward=2.0, backward=2.0), Costs(forward=2.0, backward=2.0, weight=2.0)


@pytest.mark.parametrize(
    ("name", "module", "stages", "micro_batches", "costs"),
    [
        ("gpipe", "gpipe", 3, 4, EQUAL),
        ("interleaved-1f1b", "interleaved", 2, 4, EQUAL),
        ("zb-h1", "zero_bubble", 3, 5, SPLIT),
        ("zb-h2", "zero_bubble", 3, 5, SPLIT),
        ("zb-v", "zero_bubble_v", 2, 3, SPLIT),
    ],
)
def test_docstrings_draw_the_schedule(name, module, stages, micro_batches, costs):
    doc = importlib.import_module(f"paci_schedule.core.schedules.{module}").__doc__
    lines = [line.strip() for line in doc.splitlines()]
    for line in drawn(name, stages, micro_batches, costs):
        assert line in lines


# ---- a sweep through the validator ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7, 8, 16])
def test_every_schedule_is_valid(name, stages):
    tried = 0
    for micro_batches in (1, 2, 3, stages, 2 * stages - 1, 2 * stages, 3 * stages + 1, 4 * stages):
        spec = PipelineSpec(stages=stages, accumulation=micro_batches)
        try:
            schedule(name).check(spec)
        except ConfigError:
            continue
        tried += 1
        check_schedule(schedule(name), spec, batches=3)
    assert tried >= 3


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_interleaved_is_valid_with_any_number_of_chunks(chunks):
    check_schedule(schedule("interleaved-1f1b", chunks=chunks), PipelineSpec(stages=4, accumulation=8))


@pytest.mark.parametrize("extra", [1, 3, 8])
def test_paci_is_valid_with_extra_in_flight(extra):
    for leading in (False, True):
        check_schedule(
            schedule("paci", leading=leading), PipelineSpec(stages=5, accumulation=3, extra_in_flight=extra), batches=5
        )


@pytest.mark.parametrize("name", SCHEDULES)
def test_calls_hold_their_own_batches_however_they_are_read(name):
    spec = PipelineSpec(stages=3, accumulation=6)
    calls = [list(call) for call in list(schedule(name).calls(spec, 1, 3))]
    assert [op for call in calls for op in call] == list(schedule(name).stream(spec, 1, 3))
    if schedule(name).flushes:
        assert [{op.index // 6 for op in call if op.kind.value != "STEP"} for call in calls] == [{0}, {1}, {2}]


def test_both_cuts_of_paci_are_one_stream_in_other_calls():
    spec = PipelineSpec(stages=3, accumulation=2)
    lagging, leading = schedule("paci"), schedule("paci", leading=True)
    for stage in range(3):
        assert list(lagging.stream(spec, stage, 4)) == list(leading.stream(spec, stage, 4))
    calls = [" ".join(map(str, call)) for call in leading.calls(spec, 0, 3)]
    assert calls == ["F0 F1 F2 B0 F3 B1 STEP0", "F4 B2 F5 B3 STEP1", "B4 B5 STEP2"]
    calls = [" ".join(map(str, call)) for call in lagging.calls(spec, 0, 3)]
    assert calls == ["F0 F1", "F2 B0 F3 B1 STEP0", "F4 B2 F5 B3 STEP1", "B4 B5 STEP2"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_declared_drift_is_reached_and_kept(name):
    spec = PipelineSpec(stages=4, accumulation=4)
    chosen = schedule(name)
    for stage in range(4):
        meter = DriftMeter().record_all(op for op in chosen.stream(spec, stage, 6))
        assert meter.largest == chosen.drift_bound(spec, stage)


# ---- what the validator refuses -------------------------------------------------------------------------------------

VALID = "F0 F1 B0 W0 B1 W1 STEP0\nF0 B0 F1 B1 W0 W1 STEP0"


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        (("W1 STEP0\n", "STEP0 W1\n"), "STEP0 after 1 backwards"),
        (("F0 F1 B0 W0", "F0 F1 W0 B0"), "W0 where B of that micro-batch is next"),
        (("F0 F1 B0", "F0 F0 B0"), "F0 where B of that micro-batch is next"),
        (("B1 W1 STEP0\n", "B1 STEP0\n"), "STEP0 after 1 backwards"),
        (("W1 STEP0\n", "W1\n"), "2 backwards but 0 updates"),
        (("F0 F1 B0 W0 B1 W1", "F0 B0 W0 F1 B1 W1"), None),
        (("\nF0 B0 F1 B1", "\nF0.1 B0 F1 B1"), "F0.1 is not an op of zb-h1"),
        (("F0 F1 B0 W0 B1 W1 STEP0", "F0 B0 W0 STEP0"), "the stages have [1, 2] forwards"),
        (("\nF0 B0", "\n# F0 B0"), "1 rows for 2 stages"),
    ],
)
def test_a_mutilated_grid_is_refused_with_its_reason(swap, message):
    spec, chosen = PipelineSpec(stages=2, accumulation=2), schedule("zb-h1")
    check_grid(chosen, spec, grid.read(VALID))
    assert swap[0] in VALID
    rows = grid.read(VALID.replace(*swap))
    if message is None:
        check_grid(chosen, spec, rows)
        return
    with pytest.raises(
        ScheduleError, match=r"(?s)" + message.replace("[", r"\[").replace("]", r"\]").replace(".", r"\.")
    ):
        check_grid(chosen, spec, rows)


def test_a_deadlock_is_found_and_marked():
    # stage 0 wants the gradient of micro-batch 0 before it sends micro-batch 1, stage 1 wants both forwards first
    rows = grid.read("F0 B0 F1 B1 STEP0\nF0 F1 B0 B1 STEP0")
    with pytest.raises(ScheduleError, match=r"(?s)deadlock.*>B0<.*>F1<"):
        check_grid(schedule("gpipe"), PipelineSpec(stages=2, accumulation=2), rows)


def test_too_many_in_flight_are_refused():
    rows = grid.read("F0 F1 F2 B0 B1 B2 STEP0\nF0 B0 F1 B1 F2 B2 STEP0")
    with pytest.raises(ScheduleError, match=r"3 in flight, at most 2 allowed"):
        check_grid(schedule("1f1b"), PipelineSpec(stages=2, accumulation=3), rows)


def test_one_update_more_than_the_bound_between_forward_and_backward_is_refused():
    rows = grid.read("F0 F5 B0 F1 B1 STEP0 F2 B2 F3 B3 STEP1 F4 B4 B5 STEP2\nF0")
    rows[1] = list(schedule("paci").stream(PipelineSpec(stages=2, accumulation=2), 1, 3))
    with pytest.raises(ScheduleError, match="drift 2 at B5, bound 1"):
        check_grid(schedule("paci"), PipelineSpec(stages=2, accumulation=2), rows)


def test_a_backward_after_the_wrong_update_is_refused():
    rows = grid.read("F0 B0 STEP0 F1 B1 STEP1")
    check_grid(schedule("paci"), PipelineSpec(stages=1, accumulation=1), rows)
    with pytest.raises(ScheduleError, match="STEP0 after 1 backwards, with 2 to an update"):
        check_grid(schedule("paci"), PipelineSpec(stages=1, accumulation=2), rows)


# ---- asking for a schedule ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_know_their_names(name):
    assert schedule(name).name == name


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: schedule("pacy"), r"schedule='pacy': must be one of .*did you mean 'paci'"),
        (lambda: schedule("gpipe", chunks=2), r"chunks=2: not an option of the gpipe schedule"),
        (lambda: schedule("interleaved-1f1b", chunks=1), r"chunks=1: .* at least 2"),
        (
            lambda: schedule("interleaved-1f1b").check(PipelineSpec(stages=3, accumulation=4)),
            r"multiple of the 3 stages",
        ),
        (lambda: schedule("pipedream-2bw").check(PipelineSpec(stages=4, accumulation=2)), r"stages - 1 = 3"),
        (
            lambda: schedule("1f1b").check(PipelineSpec(stages=4, accumulation=2, extra_in_flight=1)),
            r"extra_in_flight=1: 1f1b has a fixed",
        ),
    ],
)
def test_what_does_not_exist_is_refused(ask, message):
    with pytest.raises(ConfigError, match=message):
        ask()


def test_weaving_numbers_micro_batches_and_drops_those_beyond_the_batch():
    f, b = (kind for kind in grid.read("F0 B0")[0])
    pattern = [(f.kind, 0), (f.kind, 1), (f.kind, 0), (b.kind, 0), (f.kind, 0)]
    assert [str(op) for op in weave(pattern, 2)] == ["F0", "F0.1", "F1", "B0"]


def test_grids_read_back():
    spec = PipelineSpec(stages=3, accumulation=4)
    rows = [list(schedule("zb-v").stream(spec, stage, 2)) for stage in range(3)]
    assert grid.read(grid.write(rows)) == rows
    assert grid.read("stage 0: F0,B0;STEP0\n\n# nothing\n. . F0 . B0") == grid.read("F0 B0 STEP0\nF0 B0")
    with pytest.raises(ScheduleError, match=r"line 2: 'X1' is not an op"):
        grid.read("F0\nX1")
    with pytest.raises(ScheduleError, match="empty"):
        grid.read("\n# F0\n")

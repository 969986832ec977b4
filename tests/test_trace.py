"""Recorded runs: reading, merging clocks, where the time went, and the same ops simulated."""

import json

import pytest

from paci_schedule import ConfigError, PipelineSpec, trace
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.execute import simulate

STAGES, ACCUMULATION = 3, 2


def record(folder, stage, rows, wall=1000.0, mono=50.0, stages=STAGES):
    """Write a trace file; `rows` are (op, start, end) in seconds since the run began."""
    header = {"stage": stage, "stages": stages, "accumulation": ACCUMULATION, "clock": {"wall": wall, "mono": mono}}
    folder.mkdir(exist_ok=True)
    path = folder / f"stage{stage}.jsonl"
    lines = [header] + [{"op": op, "start": start + mono, "end": end + mono} for op, start, end in rows]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def recorded(folder, skew=(0.0, 0.0, 0.0), batches=3, drains=1, step=0.5, costs=None):
    """Trace files of a simulated run of PACI (F 1, B 2), with waits, drained and begun anew `drains` times."""
    spec = PipelineSpec(stages=STAGES, accumulation=ACCUMULATION)
    timeline = simulate(
        schedule("paci"), spec, Costs(**{"forward": 1.0, "backward": 2.0, "step": step} | (costs or {})), batches
    )
    paths = []
    for stage, row in enumerate(timeline.rows):
        rows, free = [], None
        for drain in range(drains):
            for span in row:
                start, end = (moment + drain * timeline.makespan for moment in (span.start, span.end))
                waits = {"F": "RA", "B": "RG"}.get(span.op.kind.value)
                if waits == "RA" and stage == 0:
                    waits = "data"
                if free is not None and waits and start > free and not (waits == "RG" and stage == STAGES - 1):
                    rows.append((waits if waits == "data" else f"{waits}{span.op.index}", free, start))
                rows.append((str(span.op), start, end))
                free = end
        paths.append(record(folder, stage, rows, wall=1000.0 + skew[stage], mono=50.0 + 7 * stage))
    return paths, timeline


def test_a_recording_comes_back_as_it_was(tmp_path):
    paths, timeline = recorded(tmp_path)
    merged = trace.merge([trace.read(path) for path in reversed(paths)])
    back = trace.timeline(merged)
    for row, original in zip(back.rows, timeline.rows, strict=True):
        assert [span.op for span in row] == [span.op for span in original]
        assert [span.start for span in row] == pytest.approx([span.start for span in original], abs=1e-6)


def test_the_simulated_run_has_the_medians_of_the_recorded(tmp_path):
    paths, timeline = recorded(tmp_path)
    expected = trace.simulated(trace.merge([trace.read(path) for path in paths]))
    assert expected.makespan == pytest.approx(timeline.makespan, abs=1e-6)


def test_seconds_of_a_recording_add_up_to_its_length(tmp_path):
    paths, timeline = recorded(tmp_path)
    for stage, path in enumerate(paths):
        spent = trace.spent(trace.read(path))
        assert spent["compute"] == pytest.approx(6 * 3)
        assert spent["step"] == pytest.approx(3 * 0.5)
        row = timeline.rows[stage]
        assert sum(spent.values()) == pytest.approx(row[-1].end - row[0].start)
    assert trace.spent(trace.read(paths[0]))["wait for gradient"] > 1
    assert trace.spent(trace.read(paths[0]))["wait for activation"] == 0


def test_micro_batches_are_numbered_on_over_drains(tmp_path):
    paths, _ = recorded(tmp_path, drains=3)
    recordings = trace.merge([trace.read(path) for path in paths])
    forwards = [[span.op.index for span in recording.spans if str(span.op).startswith("F")] for recording in recordings]
    assert forwards == [list(range(18))] * 3
    assert len(trace.simulated(recordings).rows[0]) == 3 * 15


def test_updates_and_their_sums_keep_their_numbers_over_drains(tmp_path):
    ops = ["F0", "B0", "F1", "B1", "STEP0", "SUM0"] * 2
    read = trace.read(record(tmp_path, 2, [(op, at, at + 1) for at, op in enumerate(ops)]))
    assert " ".join(str(span.op) for span in read.spans) == "F0 B0 F1 B1 STEP0 SUM0 F2 B2 F3 B3 STEP0 SUM0"


@pytest.mark.parametrize("skew", [(0.0, 30.0, -20.0), (0.0, -3600.0, 5.0)])
def test_wrong_wall_clocks_are_set_right_by_the_messages(tmp_path, skew):
    paths, timeline = recorded(tmp_path, skew=skew)
    back = trace.timeline(trace.merge([trace.read(path) for path in paths]))
    for row, original in zip(back.rows, timeline.rows, strict=True):
        assert row[0].start == pytest.approx(original[0].start, abs=1.0)  # the messages leave that much room


def test_a_ring_buffers_content_is_simulated_where_it_is_whole(tmp_path):
    paths, _ = recorded(tmp_path, batches=8)
    for stage, path in enumerate(paths):
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[:1] + lines[10 + 3 * stage :]))
    expected = trace.simulated(trace.merge([trace.read(path) for path in paths]))
    assert all(len(row) > 10 for row in expected.rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "line 1 does not belong to a trace"),
        (lambda lines: ["{}", *lines[1:]], "line 1 .*KeyError"),
        (lambda lines: [*lines[:2], "{oops", *lines[3:]], "line 3 does not belong to a trace"),
        (lambda lines: [*lines[:2], '{"op": "Z3", "start": 1, "end": 2}'], "line 3 .*'Z3' is not an op"),
        (lambda lines: [lines[0].replace('"stage": 0', '"stage": 3'), *lines[1:]], "line 1 .*stages 0 to 2"),
        (lambda lines: [lines[0].replace('"stages": 3', '"stages": Infinity'), *lines[1:]], "line 1 .*stages=inf"),
        (
            lambda lines: [*lines[:2], '{"op": "F3", "start": 2, "end": 1}'],
            "line 3 .*from 2.0 to 1.0 is not a span of time",
        ),
        (lambda lines: [*lines[:2], '{"op": "F3", "start": NaN, "end": 1}'], "line 3 .*from nan"),
        (lambda lines: [lines[0].replace("1000.0", "Infinity"), *lines[1:]], "line 1 .*the clocks are inf apart"),
        (lambda lines: lines[:1], "contains no forward"),
    ],
)
def test_broken_files_are_refused_with_their_line(tmp_path, change, message):
    path = recorded(tmp_path)[0][0]
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(ConfigError, match=message):
        trace.read(path)


def test_an_order_that_cannot_run_is_refused(tmp_path):
    paths, _ = recorded(tmp_path)
    lines = paths[1].read_text().splitlines()
    early = next(line for line in lines if '"B4"' in line)
    paths[1].write_text("\n".join([lines[0], early, *lines[1:]]))
    with pytest.raises(ConfigError, match="cannot run in their order"):
        trace.simulated(trace.merge([trace.read(path) for path in paths]))


def test_missing_and_foreign_stages_are_refused(tmp_path):
    paths, _ = recorded(tmp_path)
    recordings = [trace.read(path) for path in paths]
    with pytest.raises(ConfigError, match=r"traces of stages \[0, 2\]"):
        trace.merge([recordings[0], recordings[2]])
    foreign = trace.read(record(tmp_path, 1, [("F0", 0, 1)], stages=5))
    with pytest.raises(ConfigError, match="different jobs"):
        trace.merge([recordings[0], foreign, recordings[2]])
    with pytest.raises(ConfigError, match="cannot be read"):
        trace.read(tmp_path / "none.jsonl")

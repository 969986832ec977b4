"""Pictures of timelines: text, Chrome traces, SVG and PNG."""

import json
from dataclasses import replace

import pytest

from paci_schedule import ConfigError, PipelineSpec
from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.draw.chrome import chrome_trace
from paci_schedule.draw.colours import colour
from paci_schedule.draw.picture import picture
from paci_schedule.draw.shown import versions
from paci_schedule.draw.text import text
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.execute import simulate
from paci_schedule.simulate.timeline import Span, Timeline


def paci(batches=3, **costs):
    spec = PipelineSpec(stages=3, accumulation=2)
    return simulate(schedule("paci"), spec, Costs(**{"forward": 1.0, "backward": 2.0} | costs), batches)


def test_versions_count_the_updates_and_drift_shows():
    row = paci().rows[0]
    found = {str(span.op): (version, older) for span, version, older in versions(row)}
    assert found["B1"] == (0, 0)
    assert found["B2"] == (1, 0)  # F2 ran before the first update
    assert found["F4"] == (1, 1)
    assert found["B4"] == (2, 1)


def test_text_draws_fractions_exactly_and_jitter_roughly():
    halves = text(paci(1, forward=0.5, backward=1.5)).plain.splitlines()
    assert halves[2] == "stage 2   .  .  F0 B0------ F1 B1------|"
    rough = text(paci(2, jitter=0.3)).plain
    assert rough.count("F0") == 3
    assert rough.count("|") == 6


def test_text_is_cut_off_at_the_width():
    lines = text(paci(), width=30).plain.splitlines()
    assert [len(line) for line in lines] == [30, 30, 30]
    assert all(line.endswith("…") for line in lines)


def test_a_window_keeps_the_versions_of_the_whole(tmp_path):
    whole = paci()
    window = replace(whole, shown_from=next(span.start for span in whole.rows[2] if str(span.op) == "F4"))
    assert text(window).plain.splitlines()[2] == "stage 2   F4 B4--- F5 B5---|"
    assert "F3" not in text(window).plain
    assert window.makespan == whole.end - window.shown_from
    picture({"": window}, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert ("version 0" in drawn, "version 1" in drawn, "version 2" in drawn) == (False, True, True)


def test_updates_are_counted_on_where_a_recording_begins_late():
    row = [Span(Op.parse(op), at, at + 1.0) for at, op in enumerate(("F8", "B7", "STEP3", "F9", "B8"))]
    assert [found[1:] for found in versions(row)] == [(3, 3), (3, 3), (3, 3), (4, 4), (4, 3)]


def test_sizes_that_cannot_be_drawn_are_cut_off_or_refused(tmp_path):
    late = text(paci(latency=1e99)).plain.splitlines()
    assert all(len(line) == 100_000 for line in late)
    for timelines in ({"": paci(6000)}, {str(title): paci() for title in range(67)}):
        with pytest.raises(ConfigError, match=r"\d+ ops in \d+ rows: a picture shows at most 50000 in 200"):
            picture(timelines, tmp_path / "a.svg")


def test_versions_have_their_own_colours_in_text():
    styles = {str(span.style) for span in text(paci()).spans}
    assert any("underline" in style for style in styles)
    assert len({style for style in styles if "underline" not in style}) >= 6  # F and B of three versions


def test_chrome_trace_has_every_op_with_version_and_drift():
    timeline = paci()
    trace = json.loads(json.dumps(chrome_trace({"short": paci(1), "PACI": timeline})))
    spans = [event for event in trace["traceEvents"] if (event["ph"], event["pid"]) == ("X", 1)]
    assert len(spans) == sum(len(row) for row in timeline.rows)
    late = next(event for event in spans if (event["tid"], event["name"]) == (0, "B2"))
    assert (late["cat"], late["args"]) == ("backward", {"version": 1, "drift": 1})
    assert late["dur"] == 2e6
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"]
    stages = ["stage 0", "stage 1", "stage 2"]
    assert names == ["short", *stages, "PACI", *stages]


@pytest.mark.parametrize("ending", [".svg", ".png", ".json", ".txt"])
def test_pictures_are_written_and_the_same_each_time(tmp_path, ending):
    contents = []
    for number in range(2):
        path = tmp_path / f"{number}{ending}"
        picture({"one": paci(), "two": paci(1)}, path)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    start = {
        ".svg": b"<?xml",
        ".png": b"\x89PNG",
        ".json": b'{"traceEvents"',
        ".txt": b"one\nstage 0",
    }[ending]
    assert contents[0].startswith(start)


def test_the_svg_names_micro_batches_and_versions(tmp_path):
    path = tmp_path / "a.svg"
    picture({"PACI": paci()}, path, unit="s")
    drawn = path.read_text()
    for words in ("PACI", "stage 2", "version 2", "time (s)", ">5<"):
        assert words in drawn
    assert "version 3" not in drawn  # no op runs with it


def test_empty_rows_and_instant_ops_can_be_drawn(tmp_path):
    timeline = Timeline([[Span(Op.parse("STEP0"), 1.0, 1.0)], []])
    assert text(timeline).plain.startswith("stage 0")
    picture({"": timeline}, tmp_path / "a.svg")


def test_bad_outputs_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="the ending says the format"):
        picture({"": paci()}, tmp_path / "a.pdf")
    with pytest.raises(ConfigError, match="name a file in a folder"):
        picture({"": paci()}, tmp_path / "no" / "a.svg")


def test_a_backward_on_stashed_weights_has_their_version_and_no_stripe(tmp_path):
    """PipeDream-2BW runs PACI's stream: the same ops drift under PACI."""
    spec = PipelineSpec(stages=3, accumulation=2)
    stashed = simulate(schedule("pipedream-2bw"), spec, Costs(forward=1.0, backward=2.0), 3)
    assert (stashed.stashes, paci().stashes) == (True, False)
    found = {str(span.op): (version, older) for span, version, older in versions(stashed.rows[0], stashed.stashes)}
    assert (found["F2"], found["B2"]) == ((0, 0), (0, 0))
    assert found["B4"] == (1, 1)
    drifts = [event["args"]["drift"] for event in chrome_trace({"": stashed})["traceEvents"] if event["ph"] == "X"]
    assert set(drifts) == {0}
    picture({"": stashed}, tmp_path / "stashed.svg")
    picture({"": paci()}, tmp_path / "paci.svg")
    stripe, stash = "the forward ran with the stripe's version", "backwards on stashed weights"
    drawn = [(tmp_path / name).read_text() for name in ("stashed.svg", "paci.svg")]
    assert [(stripe in each, stash in each) for each in drawn] == [(False, True), (True, False)]


def test_a_picture_says_what_waits_what_is_saved_and_what_its_letters_mean(tmp_path):
    """Three batches of 1F1B take (a + P - 1) (F + B) each; PACI's stream takes (3 a + P - 1) (F + B) for all."""
    spec = PipelineSpec(stages=3, accumulation=2)
    drawn = {name: simulate(schedule(name), spec, Costs(forward=1.0, backward=2.0), 3) for name in ("1f1b", "paci")}
    saved = drawn["1f1b"].makespan - drawn["paci"].makespan
    assert saved == 3 * 4 * 3 - 8 * 3
    captions = {"1f1b": ("bubble 50%", "bubble"), "paci": ("twice the speed", "fill")}
    picture(drawn, tmp_path / "a.svg", captions=captions)
    text = (tmp_path / "a.svg").read_text()
    for words in (
        "1f1b: bubble 50%",
        ">bubble<",
        ">fill<",
        f">{saved:g} saved<",
        "forward (F)",
        "backward (B)",
        "waiting",
    ):
        assert words in text, words
    assert "weight gradient" not in text
    assert "prefers-color-scheme: dark" in text


def test_no_swatch_stands_for_two_things():
    """The legend's kinds are grey; every other colour is one version's."""
    kinds = {colour(kind, None) for kind in (OpKind.FORWARD, OpKind.BACKWARD, OpKind.WEIGHT)}
    ops = {colour(kind, version) for kind in (OpKind.FORWARD, OpKind.BACKWARD, OpKind.WEIGHT) for version in range(6)}
    assert (len(kinds), len(ops), len(kinds & ops)) == (3, 18, 0)


def test_a_moving_picture_comes_to_every_drift(tmp_path):
    from PIL import Image

    picture({"PACI": paci(2)}, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        durations = []
        for frame in range(image.n_frames):
            image.seek(frame)
            durations.append(image.info["duration"])
    moments = {span.end for row in paci(2).rows for span in row}
    assert len(durations) == len(moments) + 1
    drifting = sum(
        version > older for row in paci(2).rows for span, version, older in versions(row) if str(span.op)[0] == "B"
    )
    assert 0 < durations.count(1400) <= drifting  # where two stages come to one at once, one is told
    with pytest.raises(ConfigError, match="a GIF shows at most 400"):
        picture({"": paci(300)}, tmp_path / "b.gif")

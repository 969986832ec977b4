"""The page that shows a run in the browser, and the figures of updates that it reads."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from paci_schedule import ConfigError, trace
from paci_schedule.cli import main
from paci_schedule.cli.page import page_of
from paci_schedule.draw.page import page
from paci_schedule.trace import Figures, append_figures, read_figures

RECORDING = Path(__file__).resolve().parents[1] / "docs" / "recording"
BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome-headless-shell")
FIGURES = Figures(stage=1, version=7, at=1.75e9, seconds=2.0, micro_batches=8, compute=1.2, wait=0.3, drift=1, loss=2.5)


def tell(folder, stage, versions):
    for version in versions:
        append_figures(str(folder), replace(FIGURES, stage=stage, version=version, loss=10 / version))


def data_of(text):
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


@pytest.fixture
def run(tmp_path):
    """A folder with the recording of two stages, and figures of their updates."""
    folder = tmp_path / "run"
    shutil.copytree(RECORDING, folder)
    for stage in range(2):
        tell(folder, stage, (2, 3, 5))
    return folder


def test_figures_are_read_as_they_were_told(tmp_path):
    append_figures(str(tmp_path), FIGURES)
    assert read_figures(tmp_path) == [[], [FIGURES]]
    assert FIGURES.told(100, tokens_per_second=30) == {
        "version": 107,
        "drift": 1,
        "waiting_share": pytest.approx(0.2),  # 0.3 s of 1.5 s
        "tokens_per_second": 120.0,  # 8 micro-batches of 30 tokens in 2 s
        "loss": 2.5,
    }


def test_a_line_that_is_being_written_is_left_out_and_a_wrong_one_is_named(tmp_path):
    append_figures(str(tmp_path), FIGURES)
    path = tmp_path / "updates" / "stage1.jsonl"
    with path.open("a") as file:
        file.write('{"stage": 1, "ver')
    assert read_figures(tmp_path)[1] == [FIGURES]
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match=r"stage1.jsonl': line 2 has no figures"):
        read_figures(tmp_path)


def test_a_page_has_schedule_waiting_drift_and_loss(run):
    data = data_of(page_of(run, batches=2))
    recorded = trace.timeline(trace.merge([trace.read(path) for path in sorted(run.glob("*.jsonl"))]))
    drawn = [op for row in data["runs"][0]["rows"] for op in row]
    last = trace.last_batches(recorded, 4, 2)
    assert len(drawn) == sum(span.start >= last.shown_from < span.end for row in recorded.rows for span in row)
    assert {op[0] for op in drawn} >= {"F159", "B159"}
    assert [op for op in drawn if op[5] > op[6]], "no drift"
    assert [each["waiting_share"] for each in data["updates"][1]] == pytest.approx([0.2] * 3)
    assert [each["loss"] for each in data["updates"][0]] == pytest.approx([5, 10 / 3, 2], abs=1e-6)
    assert data["verdicts"][0].startswith("jitter")
    assert data["summary"].startswith("2 stages; 5 updates")


def test_figures_are_no_recording(run, capsys):
    """Also where the shell names all that is in the folder."""
    for files in ([run], sorted(run.iterdir())):
        with pytest.raises(SystemExit) as exited:
            main(["trace", "--json", *map(str, files)])
        assert exited.value.code == 0, capsys.readouterr().err


def test_updates_of_a_run_that_went_on_are_counted_on(tmp_path):
    tell(tmp_path, 0, (2, 6, 2, 4))
    assert [row["update"] for row in data_of(page_of(tmp_path, 1))["updates"][0]] == [2, 6, 8, 10]


def test_only_a_page_that_is_followed_reads_itself_again(run):
    assert "http-equiv" not in page_of(run, 1)
    assert '<meta http-equiv="refresh" content="5">' in page_of(run, 1, refresh=5)


def test_a_page_that_is_followed_waits_for_the_run(run, tmp_path):
    """A run that has not begun, and a recording that is being written."""
    empty = data_of(page_of(tmp_path / "none", 1, refresh=5))
    assert (empty["updates"], empty["runs"]) == ([], [])
    (run / "stage1-replica0.jsonl").write_text("")
    assert data_of(page_of(run, 1, refresh=5))["runs"] == []
    with pytest.raises(ConfigError, match="line 1"):
        page_of(run, 1)


def test_what_a_run_is_called_cannot_end_the_data():
    text = page("</script><b>", "x")
    assert data_of(text)["title"] == "</script><b>"
    assert text.count("</script>") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--output", "run.html"], "holds neither recordings nor figures"),
        ([str(RECORDING / "stage0-replica0.jsonl"), "--output", "run.html"], "name the folder"),
        ([str(RECORDING), "--follow", "1"], "name it with --output run.html"),
        ([str(RECORDING), "--output", "no/folder/run.html"], "cannot be written"),
    ],
)
def test_what_is_no_page_is_one_error(arguments, said, capsys):
    with pytest.raises(SystemExit) as exited:
        main(["trace", *arguments])
    assert exited.value.code == 2
    assert said in capsys.readouterr().err


def shown_by_a_browser(path):
    """The page's elements after its script has run."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "Uncaught" not in done.stderr, done.stderr
    return unescape(done.stdout)


@pytest.mark.slow
def test_a_browser_draws_the_page(run, tmp_path):
    output = tmp_path / "run.html"
    with pytest.raises(SystemExit) as exited:
        main(["trace", str(run), "--output", str(output), "--batches", "2"])
    assert exited.value.code == 0
    data = data_of(output.read_text())
    drawn = shown_by_a_browser(output)
    assert '<h1 id="title">The run in run</h1>' in drawn
    for heading in ("Loss", "Waiting", "Drift", "Micro-batches a second", "Where the time went", "Schedule"):
        assert f"<h2>{heading}</h2>" in drawn
    assert drawn.count('class="op"') == sum(len(row) for each in data["runs"] for row in each["rows"])
    assert drawn.count("drift 1</title>") == sum(
        op[5] > op[6] for each in data["runs"] for row in each["rows"] for op in row
    )
    assert drawn.count('class="wait"') > 0
    assert drawn.count("<path") == 1 + 2 + 2 + 2  # the loss of the last stage; the other charts show both
    assert "http" not in re.sub(r"http://www.w3.org/\S+", "", drawn), "the page needs something from elsewhere"


@pytest.mark.slow
def test_a_browser_draws_a_run_that_has_only_begun(tmp_path):
    output = tmp_path / "run.html"
    output.write_text(page_of(tmp_path / "none", 1, refresh=600))
    drawn = shown_by_a_browser(output)
    assert "has told no figures of its updates yet" in drawn
    assert "<h2>" not in drawn

"""The study's table: each variant at its own best rate, and how much sooner it comes to flush's loss."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import convergence

SHAPE = {
    "text": "text",
    "vocabulary": 0,
    "stages": 8,
    "accumulation": 8,
    "layers": 8,
    "width": 48,
    "micro_batches": 6400,
    "dtype": "fp32",
    "optimizer": "adamw",
    "context": 64,
    "micro_batch": 4,
}


def a_run(validation, schedule="flush", prediction="off", length=1.0, lr=0.01, seed=0, **more):
    return {
        **SHAPE,
        "schedule": schedule,
        "prediction": prediction,
        "prediction_reach": 1.0,
        "flush_warmup_steps": 0,
        "length": length,
        "lr": lr,
        "warm_up": 400,
        "seed": seed,
        "validation": validation,
        "curve": [3.0, validation],
        **more,
    }


def rows(runs):
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in convergence.table(runs))
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_each_variant_has_its_own_best_rate_chosen_by_one_seed():
    flush = [a_run(2.0, lr=0.01), a_run(1.9, lr=0.02), a_run(1.8, lr=0.02, seed=1), a_run(1.0, lr=0.01, seed=2)]
    paci = [a_run(1.95, "paci", lr=0.01), a_run(2.1, "paci", lr=0.02)]
    first, second = rows(flush + paci)
    assert first["rate (of)"] == "0.02 (0.01, 0.02)"
    assert first["seeds"] == "0, 1"
    assert first["validation loss"] == "1.8500 (1.8000 to 1.9000)"
    assert (second["rate (of)"], second["minus flush's"]) == ("0.01 (0.01, 0.02)", "+0.0500")


def test_a_study_of_which_no_two_rates_share_a_seed_is_shown():
    (row,) = rows([a_run(2.0, lr=0.01), a_run(1.9, lr=0.02, seed=1)])
    assert row["rate (of)"].endswith("(0.01, 0.02)")


def test_a_warm_up_belongs_to_the_rate():
    (row,) = rows([a_run(2.0), a_run(1.9, warm_up=1600)])
    assert row["rate (of)"] == "0.01 after 1600 (0.01, 0.01 after 1600)"


def test_a_loss_is_compared_on_the_same_seeds():
    flush, paci = rows([a_run(2.0), a_run(3.0, seed=1), a_run(2.2, "paci")])
    assert (flush["minus flush's"], paci["minus flush's"]) == ("+0.0000", "+0.2000")


def test_sooner_counts_the_shortest_run_that_comes_to_flushs_loss():
    flush = a_run(2.0)
    longer = [a_run(2.01, "paci"), a_run(1.99, "paci", length=1.1), a_run(1.95, "paci", length=1.2)]
    assert rows([flush, *longer])[1]["sooner at flush's loss"] == f"{1.875 / 1.1:.3f}"
    assert rows([flush, longer[0]])[1]["sooner at flush's loss"] == "not reached"
    assert rows([flush, a_run(2.0, "paci")])[1]["sooner at flush's loss"] == "1.875"


def test_what_is_flushed_counts_in_the_ideal_time():
    _, row = rows([a_run(2.0), a_run(2.0, "paci", "every", flush_warmup_steps=80)])
    assert row["prediction"] == "every:1:80"
    assert row["ideal"] == row["sooner at flush's loss"] == f"{800 * 15 / (800 * 8 + 80 * 7):.3f}"


def test_other_models_and_texts_are_other_tables():
    runs = [a_run(2.0), a_run(1.0, accumulation=4), a_run(2.2, "paci"), a_run(1.1, "paci", accumulation=4)]
    assert [(row["a"], row["minus flush's"], row["ideal"]) for row in rows(runs) if row["schedule"] == "paci"] == [
        ("8", "+0.2000", "1.875"),
        ("4", "+0.1000", "2.750"),
    ]


def test_another_width_is_said():
    assert [row["text"] for row in rows([a_run(2.0), a_run(1.9, width=144)])] == ["text", "text, 144 wide"]


def test_the_document_has_the_table_of_its_results():
    docs = Path(__file__).resolve().parent.parent / "docs"
    table = "\n".join(convergence.table(convergence._read(docs / "convergence.jsonl")))
    assert table in (docs / "convergence.md").read_text()


@pytest.fixture
def study(tmp_path, monkeypatch, capsys):
    text = tmp_path / "goes.txt"
    text.write_text("so it goes, and goes, and goes. " * 80)

    def run(*more):
        sizes = "--layers 2 --stages 2 --accumulation 2 --width 12 --micro-batches 8"
        line = ["convergence", "--results", str(tmp_path / "runs.jsonl"), *sizes.split(), *more]
        monkeypatch.setattr(sys, "argv", line)
        convergence.main()
        return [json.loads(each) for each in (tmp_path / "runs.jsonl").read_text().splitlines()]

    return lambda *more: run("--text", str(text), *more), run


def test_a_study_goes_on_where_it_was_interrupted(study, tmp_path):
    train, read = study
    first = train("--rates", "1e-3", "--variants", "flush,paci:every")
    more = train("--rates", "1e-3,2e-3", "--variants", "flush,paci:every", "--lengths", "1,0.5")
    assert [(run["schedule"], run["prediction"]) for run in first] == [("flush", "off"), ("paci", "every")]
    assert more[:2] == first
    assert len(more) == 8
    assert [run["updates"] for run in more] == [4, 4, 4, 4, 2, 2, 2, 2]
    assert len({(run["schedule"], run["lr"], run["length"]) for run in more}) == 8
    picture = tmp_path / "curves.svg"
    assert read("--plot", str(picture)) == more
    drawn = picture.read_text()
    assert ">1F1B with flush</text>" in drawn
    assert "prefers-color-scheme: dark" in drawn


def test_the_picture_of_the_document_is_that_of_its_results(tmp_path, monkeypatch, capsys):
    docs, picture = Path(__file__).resolve().parent.parent / "docs", tmp_path / "curves.svg"
    of = ["--results", str(docs / "convergence.jsonl"), "--optimizer", "muon", "--plot-text", "tinyshakespeare"]
    of += ["--variants", "flush,paci,paci:every,paci:every:1.5"]
    monkeypatch.setattr(sys, "argv", ["convergence", *of, "--plot", str(picture)])
    convergence.main()
    paths = [
        re.findall(r'<path d="[^"]*"', each.read_text()) for each in (picture, docs / "pictures" / "convergence.svg")
    ]
    assert paths[0] == paths[1]

"""`paci rehearse`: what it prints, its JSON, its picture, and one line for bad input."""

import json
import math

import pytest
import torch

from paci_schedule import ConfigError, PipelineSpec, cli
from paci_schedule.rehearse import gpt
from paci_schedule.rehearse.comparison import batches_of, variants
from paci_schedule.rehearse.text import Text
from paci_schedule.rehearse.trial import Settings
from paci_schedule.rehearse.variant import Variant
from tests.rehearsals import one_thread  # noqa: F401

SIZES = "--stages 3 --accumulation 2 --layers 4 --width 12 --context 8 --micro-batch 2 --updates 6"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("so it goes, and goes, and goes. " * 40)
    return path


@pytest.fixture
def paci(capsys):
    """Run the command; returns exit code, standard output, standard error."""

    def run(line, *more):
        with pytest.raises(SystemExit) as exit_:
            cli.main([*line.split(), *map(str, more)])
        printed = capsys.readouterr()
        return exit_.value.code, printed.out, printed.err

    return run


def settings(**changes):
    return Settings(
        **{
            "stages": 3,
            "accumulation": 2,
            "layers": 4,
            "width": 12,
            "context": 8,
            "micro_batch": 2,
            "updates": 6,
            "lr": 0.004,
            "warm_up": 400,
            "optimizer": "adamw",
            "dtype": "fp32",
            "seed": 0,
            "device": "cpu",
            **changes,
        }
    )


def test_json_holds_the_runs_at_equal_tokens_and_in_equal_time(paci, text):
    code, out, err = paci(f"rehearse {SIZES} --schedules flush,paci --prediction off,every,2 --json --text", text)
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["settings"]["width"] == 12
    runs = found["runs"]
    assert [(run["equal_tokens"]["schedule"], run["equal_tokens"]["prediction"]) for run in runs] == [
        ("flush", "off"),
        ("paci", "off"),
        ("paci", "every"),
        ("paci", 2),
    ]
    assert [run["equal_tokens"]["updates"] for run in runs] == [6] * 4
    assert [run["equal_time"]["updates"] for run in runs] == [3, 6, 6, 6]  # 6 a / (a + P - 1)
    assert [len(run["equal_time"]["losses"]) for run in runs] == [3, 6, 6, 6]
    assert [run["equal_tokens"]["drift"] for run in runs] == [[0, 0, 0], *[[1, 1, 0]] * 3]
    validation = [run["equal_tokens"]["validation"] for run in runs]
    assert len(set(validation)) == 4
    assert all(0 < loss < 1.1 * math.log(15) for loss in validation)


@pytest.mark.parametrize("optimizer", ["nadam", "muon"])
@pytest.mark.parametrize("name", ["pipedream", "pipedream-2bw", "paci-stash"])
def test_every_schedule_and_optimizer_runs(paci, text, name, optimizer):
    code, out, _ = paci(f"rehearse {SIZES} --schedules {name} --optimizer {optimizer} --json --text", text)
    run = json.loads(out)["runs"][0]["equal_tokens"]
    assert code == 0
    assert len(run["losses"]) == 6
    assert run["validation"] < 3


def test_native_bf16_and_a_byte_pair_encoding(paci, text):
    found = {}
    for more in ("", "--dtype bf16", "--vocabulary 260"):
        line = f"rehearse {SIZES} --context 4 --schedules paci --prediction every {more} --json --text"
        code, out, err = paci(line, text)
        assert (code, err) == (0, "")
        found[more] = json.loads(out)["runs"][0]["equal_tokens"]["validation"]
    characters, bf16, pairs_of_bytes = found.values()
    assert 0 < abs(bf16 - characters) < 0.02
    assert characters < math.log(15) < pairs_of_bytes < 1.1 * math.log(260)


def test_a_byte_pair_encoding_learns_from_the_training_text_only(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ab" * 900 + " cd" * 100)
    text = Text(path, 8, torch.device("cpu"), vocabulary=300)
    assert text.micro_batch(0, 0, 50)[0].unique().tolist() == [257]  # the bytes, "ab", " ab"
    assert len(text.validation(50)[0].unique()) == 3  # " ", "c" and "d"


def test_a_table_and_a_picture(paci, text, tmp_path):
    picture = tmp_path / "curves.png"
    code, out, _ = paci(f"rehearse {SIZES} --output {picture} --text", text)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert [row[:2] for row in rows[1:]] == [["flush", "off"], ["paci", "off"], ["paci", "every"]]
    assert rows[1][4] == "3"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_run_and_another_another(paci, text):
    line = f"rehearse {SIZES} --schedules paci --prediction off --json --text"
    first, again, other = (json.loads(paci(line, text, "--seed", seed)[1])["runs"] for seed in (1, 1, 2))
    first, again, other = (runs[0]["equal_time"]["losses"] for runs in (first, again, other))
    assert first == again != other


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--schedules pacci", "schedules='pacci'"),
        ("--schedules pipedream-2bw --accumulation 1", "pipedream-2bw"),
        ("--prediction sometimes", "prediction='sometimes'"),
        ("--prediction 0", "prediction=0"),
        ("--prediction every:far", "prediction='every:far'"),
        ("--prediction every:1:2:3", "prediction='every:1:2:3'"),
        ("--prediction every:1:-2", "flush_warmup_steps=-2: must be a whole number of updates of at least 0"),
        ("--prediction every:9", "prediction_reach=9.0: must be a number above 0 and at most 4"),
        ("--prediction window:1.5", "prediction_reach=1.5 with prediction='window'"),
        ("--model huge", "model='huge'"),
        ("--optimizer lion", "optimizer='lion'"),
        ("--stages 5", "layers=4: 5 stages"),
        ("--stages 0", "stages=0"),
        ("--width 13", "width=13"),
        ("--context 999", "has 1280 tokens"),
        ("--updates 0", "updates=0"),
        ("--lr 0", "lr=0"),
        ("--warm-up -1", "--warm-up=-1"),
        ("--dtype fp8", "dtype='fp8'"),
        ("--vocabulary 100", "vocabulary=100: must be at least 257 (256 bytes and one pair)"),
        ("--device abacus", "device='abacus'"),
        ("--text missing.txt", "missing.txt"),
    ],
)
def test_bad_input_is_one_line(paci, text, more, words):
    code, out, err = paci(f"rehearse {SIZES} --text {text} {more}")
    assert (code, out) == (2, "")
    assert err.startswith("paci: ")
    assert err.count("\n") == 1
    assert words in err


def test_the_last_tenth_of_a_text_is_never_trained_on(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 900 + "b" * 100)
    text = Text(path, 8, torch.device("cpu"))
    training = torch.cat([text.micro_batch(0, index, 50)[1] for index in range(20)])
    assert training.max() == 0
    inputs, labels = text.validation(30)
    assert inputs.min() == labels.min() == 1
    inputs, labels = text.micro_batch(0, 3, 5)
    assert inputs.shape == labels.shape == (5, 8)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_model_in_stages_is_the_model_in_one(count):
    whole, parts = gpt.stages(1, 5, 24, 8, 11, seed=3), gpt.stages(count, 5, 24, 8, 11, seed=3)
    assert [len([block for block in part if isinstance(block, gpt._Block)]) for part in parts] == [
        5 // count + (number < 5 % count) for number in range(count)
    ]
    x = torch.arange(16).view(2, 8) % 11
    expected = whole[0](x)
    for part in parts:
        x = part(x)
    assert torch.equal(x, expected)
    assert x.shape == (2, 8, 11)


def test_the_model_does_not_look_ahead():
    (model,) = gpt.stages(1, 2, 12, 6, 5, seed=0)
    ids = torch.tensor([[0, 1, 2, 3, 4, 0], [0, 1, 2, 4, 4, 4]])
    first, second = model(ids)
    assert torch.equal(first[:3], second[:3])
    assert not torch.equal(first[3:], second[3:])


def test_the_ideal_time_of_a_flush_has_its_bubble_in_it():
    eight = settings(stages=8, accumulation=8, updates=1500, layers=8)
    assert batches_of(Variant("flush"), eight) == 800
    assert batches_of(Variant("paci"), eight) == 1500
    assert batches_of(Variant("paci", flush_warmup_steps=80), eight) == 1500 - 80 * 7 / 8
    assert batches_of(Variant("paci", flush_warmup_steps=9000), eight) == 800


def test_predictions_are_for_paci_only():
    spec = PipelineSpec(stages=4, accumulation=4)
    assert variants(spec, ["pipedream", "paci"], ["off", "3", "every:1.5", "off:1:40"]) == [
        Variant("pipedream"),
        Variant("paci"),
        Variant("paci", 3),
        Variant("paci", "every", 1.5),
        Variant("paci", "off", 1.0, 40),
    ]
    with pytest.raises(ConfigError):
        variants(spec, ["paci"], ["-1"])

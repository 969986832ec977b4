"""Every option of every command gets bad input: one line that names the value and the rule, exit code 2, no traceback.

The options are read off the commands, so that an option without a bad value here fails the test.
"""

import time

import click
import pytest

from paci_schedule import cli
from tests.test_cli import paci  # noqa: F401  a fixture
from tests.test_trace import recorded

COMMANDS = cli._paci.commands
SHAPE = {"--schedule": "paci", "--stages": "3", "--micro-batches": "4"}
JOB = {"--model": "gpt2", "--devices": "8", "--memory": "80", "--global-batch": "64"}

GOOD = {  # what makes a command that runs; {run} is the folder of a recording, {text} a file
    "show": SHAPE,
    "check": SHAPE,
    "simulate": SHAPE,
    "plan": JOB,
    "profile": {"": "{run}/layers.py:model", "--output": "{text}.json"},
    "rehearse": {"--text": "{text}", "--stages": "2", "--accumulation": "2"},
    "trace": {"": "{run}"},
    "calibrate": {"": "{run}"},
    "doctor": {},
}
_COSTS = {
    "--forward": "1,b",
    "--backward": "nan",
    "--weight": "-1",
    "--step": "inf",
    "--latency": "1,2,3,4",
    "--bandwidth": "0",
    "--unit": "h",
    "--message-bytes": "nan",
    "--jitter": "nan",
    "--seed": "-1",
    "--sync": "-1",
    "--straggler": "7:2",
    "--slow-link": "0:nan",
}
_SHAPES = {
    "--schedule": "pacy",
    "--stages": "99999999999999999999",
    "--micro-batches": "0",
    "--chunks": "-1",
    "--cut": "leadin",
    "--extra-in-flight": "-1",
}
BAD = {  # option -> a value that breaks its rule; "" stands for the files
    "show": {**_SHAPES, **_COSTS, "--batches": "0", "--width": "0", "--output": "/no/such/folder/a.svg"},
    "check": {**_SHAPES, "": "{text}", "--batches": "-1"},
    "simulate": {**_SHAPES, **_COSTS, "--batches": "x", "--activation-bytes": "nan", "--weight-bytes": "-1"},
    "plan": {
        "--model": "gpt2-meduim",
        "--layers": "{text}",
        "--devices": "0",
        "--gpu": "h10",
        "--memory": "nan",
        "--global-batch": "-4",
        "--sequence-length": "0",
        "--tflops": "inf",
        "--measured": "1e400",
        "--bandwidth": "-1",
        "--latency": "nan",
        "--attention": "flsh",
        "--zero": "7",
        "--tensor-parallel": "0",
        "--max-drift": "-1",
        "--schedule": "pacy",
        "--stages": "-2",
        "--micro-batch-size": "0",
        "--recompute": "al",
        "--prediction": "evry",
        "--top": "0",
    },
    "profile": {"": "{text}:model", "--output": "/", "--repeats": "0"},
    "rehearse": {
        "--text": "/dev/zero",
        "--stages": "0",
        "--accumulation": "0",
        "--schedules": "pacy",
        "--prediction": "evry",
        "--model": "large",
        "--layers": "0",
        "--width": "7",
        "--context": "0",
        "--micro-batch": "0",
        "--updates": "0",
        "--lr": "nan",
        "--warm-up": "-1",
        "--optimizer": "adan",
        "--dtype": "fp8",
        "--vocabulary": "-1",
        "--seed": "-1",
        "--device": "tpux",
        "--output": "/no/such/folder/a.svg",
    },
    "trace": {
        "": "{text}",
        "--against": "{text}",
        "--batches": "0",
        "--width": "0",
        "--output": "a.bmp",
        "--follow": "-1",
    },
    "calibrate": {"": "/dev/zero", "--schedule": "pacy"},
    "doctor": {"": "{text}"},
}


def options(command):
    """The option strings of a command that take a value; "" where it takes files."""
    for parameter in COMMANDS[command].params:
        if isinstance(parameter, click.Argument):
            yield ""
        elif not parameter.is_flag:
            yield parameter.opts[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_bad_value_here(command):
    assert set(options(command)) == set(BAD[command])


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    recorded(folder / "run")
    text = folder / "text"
    text.write_bytes(b"\xff\xfe nothing")
    return {"run": str(folder / "run"), "text": str(text)}


def line(command, changes, places):
    """The arguments of the command with these changes of its good ones."""
    given = {**GOOD[command], **changes}
    if command == "plan" and "--layers" in changes:
        del given["--model"]
    words = [word for option, value in given.items() for word in ([option, value] if option else [value])]
    return [command, *(word.format(**places) for word in words)]


CASES = [(command, option, value) for command, bad in BAD.items() for option, value in bad.items()]


@pytest.mark.parametrize(("command", "option", "value"), CASES)
def test_a_bad_value_is_one_line_that_says_what_is_wrong(command, option, value, paci, places):  # noqa: F811
    started = time.monotonic()
    code, out, err = paci(*line(command, {option: value}, places))
    assert (code, out) == (2, ""), err
    assert err.startswith("paci: ")
    assert err.count("\n") == 1
    assert len(err) < 2000
    assert "Traceback" not in err
    assert time.monotonic() - started < 60


EXTREME = ("nan", "-inf", "1e400", "-1", "0", "99999999999999999999", "", "x" * 10_000, "1,2", "\u0663")
NUMBERS = [
    (command, option) for command, option, _ in CASES if command in ("show", "simulate", "check", "plan") and option
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), NUMBERS)
def test_no_extreme_value_ends_in_a_traceback_or_takes_long(command, option, paci, places, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for value in EXTREME:
        started = time.monotonic()
        code, _, err = paci(*line(command, {option: value}, places))
        assert code in (0, 1, 2), (value, err)
        assert (code == 2) == bool(err), (value, err)
        assert err.count("\n") <= 1, (value, err)
        assert time.monotonic() - started < 60, value

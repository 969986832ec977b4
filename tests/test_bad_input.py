"""Every option of every command, config and launcher gets bad input: one line that names the value and the rule.

Commands end with exit code 2 and no traceback.  The options are read off the commands and the configs, so that an
option without a bad value here fails the test.
"""

import dataclasses
import math
import time

import click
import pytest

from paci_schedule import ConfigError, cli, launch
from paci_schedule.adapters.deepspeed.options import PaciOptions as DeepSpeedOptions
from paci_schedule.adapters.deepspeed.options import read_schedule
from paci_schedule.adapters.megatron.options import PaciOptions as MegatronOptions
from paci_schedule.adapters.options import Options, flag_options
from paci_schedule.adapters.torch.options import PaciOptions as TorchOptions
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


# ---- the options of the schedule, in the configs of the frameworks and as flags --------------------------------------

READ = {
    "deepspeed": (DeepSpeedOptions, lambda block: read_schedule({"pipeline_schedule": "paci", "paci": block})),
    "megatron": (MegatronOptions, MegatronOptions.read),
    "torch": (TorchOptions, TorchOptions.read),
}
BAD_VALUES = {  # option -> a value that breaks its rule, and a word of the rule
    "timeout": (0, "seconds"),
    "clip": ("globl", "did you mean 'global'"),
    "flush_warmup_steps": (-1, "at least 0"),
    "early_receives": ("yes", "true or false"),
    "prediction": ("evry", "'every' (at every stale forward)"),
    "prediction_reach": (0, "above 0"),
    "on_nonfinite": ("stop", "must be one of 'ignore', 'raise', 'skip'"),
    "loss_spike": (-0.5, "greater than 0"),
    "loss_spike_flush_steps": (0, "at least 1"),
    "record": (3, "the name of a folder"),
    "extra_in_flight": ([1, -1], "at least 0"),
    "train_iters": (0, "greater than 0"),
    "drain_interval": (1.5, "whole number"),
}
STRANGE = (None, True, -1, 0, 1, 10**30, 0.5, math.nan, math.inf, "", "x" * 10_000, [], [1], {}, {"a": 1}, (), b"1")


def test_every_option_of_a_config_has_a_bad_value_here():
    assert {field.name for options, _ in READ.values() for field in dataclasses.fields(options)} == set(BAD_VALUES)


@pytest.mark.parametrize(
    ("framework", "option"),
    [(name, field.name) for name, (options, _) in READ.items() for field in dataclasses.fields(options)],
)
def test_a_bad_value_in_a_config_is_one_line_with_value_and_rule(framework, option):
    _, read = READ[framework]
    value, rule = BAD_VALUES[option]
    with pytest.raises(ConfigError) as refused:
        read({option: value})
    message = str(refused.value)
    assert "\n" not in message
    assert all(words in message for words in (option, repr(value), rule)), message


@pytest.mark.parametrize(
    ("framework", "option"),
    [(name, field.name) for name, (options, _) in READ.items() for field in dataclasses.fields(options)],
)
def test_whatever_a_config_holds_is_taken_or_refused(framework, option):
    """Nothing but a ConfigError of one line, and never for the default."""
    options, read = READ[framework]
    read({option: getattr(options(), option)} if getattr(options(), option) is not None else {})
    errors = []
    for value in STRANGE:
        try:
            read({option: value})
        except ConfigError as error:
            errors.append(str(error))
    assert errors
    assert all("\n" not in error and len(error) < 25_000 for error in errors)


@pytest.mark.parametrize("option", [name for name, made in flag_options(MegatronOptions).items() if made is not bool])
def test_a_bad_flag_of_the_launcher_is_one_line_with_value_and_rule(option, capsys):
    value, rule = BAD_VALUES[option]
    flag = f"--paci-{option.replace('_', '-')}"
    given = "" if option == "record" else str(value)
    with pytest.raises(SystemExit) as ended:
        launch.our_flags(MegatronOptions).parse_known_args([flag, given])
    assert ended.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert all(words in line for words in (flag, repr(given), rule)), line


def test_the_launcher_s_help_names_every_flag():
    assert launch.__doc__
    for option in {**flag_options(Options), **flag_options(MegatronOptions)}:
        assert f"    --paci-{option.replace('_', '-')} " in launch.__doc__

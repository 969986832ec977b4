"""The options of the schedule: their rules, from a config and from a command line."""

import math

import pytest

from paci_schedule import ConfigError
from paci_schedule.adapters.options import LONGEST, Options, flag_options, parse, read


def read_block(block):
    return read(Options, block, f"paci = {block!r}", lambda name, value: f"paci.{name} = {value}")


@pytest.mark.parametrize("value", [1, 0.5, LONGEST])
def test_a_number_of_seconds_is_a_timeout(value):
    assert read_block({"timeout": value}).timeout == value


@pytest.mark.parametrize("value", [0, -3, LONGEST + 1, 1e20, math.inf, math.nan, True, "60", None])
def test_a_timeout_that_no_clock_can_count_is_refused_with_its_rule(value):
    with pytest.raises(ConfigError, match=rf"paci.timeout = {value!r}: must be .* seconds".replace("+", r"\+")):
        read_block({"timeout": value})


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"clip": "globl"}, "paci.clip = 'globl': must be one of 'global', 'stage'; did you mean 'global'"),
        ({"flush_warmup_steps": 1.5}, "must be a whole number of updates"),
        ({"flush_warmup_steps": -1}, "must be a whole number of updates"),
        ({"early_receives": 1}, "must be true or false"),
        (
            {"on_nonfinite": "skip", "prediction": "every"},
            "paci.on_nonfinite = 'skip' with prediction='every': weights",
        ),
        ({"loss_spike": 0}, "paci.loss_spike = 0: must be a finite number greater than 0"),
        ({"loss_spike": math.inf}, "must be a finite number greater than 0"),
        ({"loss_spike": "0.5"}, "must be a finite number greater than 0"),
        ({"loss_spike_flush_steps": 0}, "must be a whole number of updates of at least 1"),
        ({"record": ""}, "must be the name of a folder"),
        ({"prediction": "evry"}, "must be 'off', 'window'"),
        ({"prediction": "every", "prediction_reach": 9}, "must be a number above 0"),
        ({"prediction": "window", "prediction_reach": 1.5}, "paci.prediction_reach = 1.5 with prediction='window'"),
        ({"timeot": 5}, "paci.timeot = ...: unknown option.*did you mean 'timeout'"),
        ([1], r"paci = \[1\]: must be a block of options"),
    ],
)
def test_a_value_that_breaks_a_rule_is_refused_as_it_was_written(block, says):
    with pytest.raises(ConfigError, match=says):
        read_block(block)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("timeout", "2.5", 2.5),
        ("clip", "stage", "stage"),
        ("flush_warmup_steps", "3", 3),
        ("prediction", "every", "every"),
        ("prediction", "2", 2),
        ("prediction_reach", "1.5", 1.5),
        ("loss_spike", "0.5", 0.5),
        ("loss_spike_flush_steps", "20", 20),
        ("record", "runs", "runs"),
    ],
)
def test_a_flag_sets_what_the_config_would(name, text, value):
    parsed = parse(Options, name, text)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "text"), [("timeout", "soon"), ("flush_warmup_steps", "1.5"), ("prediction", "0"), ("clip", "none")]
)
def test_a_wrong_text_behind_a_flag_is_refused_with_the_rule(name, text):
    with pytest.raises(ConfigError, match=f"'{text}': must be "):
        parse(Options, name, text)


def test_every_option_that_all_frameworks_have_has_a_flag():
    assert list(flag_options(Options)) == [
        "timeout",
        "clip",
        "flush_warmup_steps",
        "early_receives",
        "prediction",
        "prediction_reach",
        "on_nonfinite",
        "loss_spike",
        "loss_spike_flush_steps",
        "record",
    ]

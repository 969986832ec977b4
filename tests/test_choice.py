"""The schedules that a config may name, and the options beside them."""

import pytest

from paci_schedule import ConfigError, UnsupportedError
from paci_schedule.adapters.choice import IN_EVERY_LOOP, RUNNABLE, check_choice
from paci_schedule.adapters.deepspeed.options import read_schedule
from paci_schedule.core.schedules.registry import SCHEDULES


def test_what_an_engine_runs_and_what_any_training_loop_runs():
    assert RUNNABLE == ("gpipe", "1f1b", "zb-h1", "paci")
    assert IN_EVERY_LOOP == ("1f1b", "paci")


@pytest.mark.parametrize("name", [["paci"], {"name": "paci"}, 3, None])
def test_what_is_no_name_at_all_is_refused_with_the_valid_ones(name):
    with pytest.raises(ConfigError, match="unknown; valid are '1f1b', 'gpipe', 'paci', 'zb-h1'"):
        check_choice(name, f"schedule={name!r}")


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in RUNNABLE])
def test_a_schedule_that_no_engine_runs_is_refused_with_the_reason(name):
    with pytest.raises(UnsupportedError, match=f"schedule={name!r}: cannot be run, since the schedule .*; valid are"):
        check_choice(name, f"schedule={name!r}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("interleaved-1f1b", "several chunks a stage"),
        ("zb-v", "two chunks a stage"),
        ("zb-h2", "2P - 1 micro-batches"),
        ("pipedream", "several versions of the weights"),
    ],
)
def test_the_reason_is_the_schedule_s_own(name, reason):
    with pytest.raises(UnsupportedError, match=reason):
        read_schedule({"pipeline_schedule": name})


@pytest.mark.parametrize("name", ["gpipe", "zb-h1"])
def test_a_training_loop_that_steps_itself_refuses_other_flushes(name):
    with pytest.raises(
        UnsupportedError, match=r"whose training loop steps the optimizer itself.*valid are '1f1b', 'paci'"
    ):
        check_choice(name, f"config.pipeline_schedule = {name!r}", IN_EVERY_LOOP)


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown; valid are .*did you mean 'zb-h1'"):
        read_schedule({"pipeline_schedule": "zb_h1"})


@pytest.mark.parametrize("name", ["gpipe", "zb-h1"])
@pytest.mark.parametrize(
    "option", [{"extra_in_flight": 1}, {"prediction": "every"}, {"flush_warmup_steps": 3}, {"clip": "stage"}]
)
def test_an_option_of_drift_is_refused_beside_a_schedule_that_flushes(name, option):
    (key, value), *_ = option.items()
    with pytest.raises(ConfigError, match=f'"{key}": {value!r}}} with "pipeline_schedule": "{name}": .*leave it out'):
        read_schedule({"pipeline_schedule": name, "paci": option})
    assert read_schedule({"pipeline_schedule": "1f1b", "paci": option}) == "1f1b"  # the way back is one key


@pytest.mark.parametrize("name", ["gpipe", "zb-h1", "paci"])
def test_other_options_stand_beside_every_schedule(name):
    options = {"timeout": 60, "early_receives": True, "clip": "global", "extra_in_flight": 0}
    assert read_schedule({"pipeline_schedule": name, "paci": options}) == name

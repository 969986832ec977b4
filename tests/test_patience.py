"""What a config may say of patience."""

import math

import pytest

from paci_schedule.adapters.patience import LONGEST, is_timeout


@pytest.mark.parametrize("value", [1, 0.5, LONGEST])
def test_a_number_of_seconds_is_a_timeout(value):
    assert is_timeout(value)


@pytest.mark.parametrize("value", [0, -3, LONGEST + 1, 1e20, math.inf, math.nan, True, "60", None])
def test_what_no_clock_can_count_is_none(value):
    assert not is_timeout(value)

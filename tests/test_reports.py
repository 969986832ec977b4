"""Sums that are only reported: what the last stage adds up, and when."""

import pytest
import torch

from paci_schedule import UnsupportedError
from paci_schedule.runtime.deferred.reports import CarriedReports


def hand_down(upper, lower):
    lower.came_down(upper.going_down().clone())


def test_the_last_stage_adds_what_the_others_handed_down():
    """Of stages 0 and 1, that is what they had reported when the newest activation left them."""
    first, second, last = (CarriedReports(3, torch.device("cpu")) for _ in range(3))
    for stage, part in ((first, 2.0), (second, 3.0)):
        stage.begin_update(at_once=False)
        stage.put(torch.tensor([part, 10 * part]))
    hand_down(first, second)
    hand_down(second, last)
    first.begin_update(at_once=False)
    first.put(torch.tensor([100.0, 100.0]))  # has left no stage yet
    last.begin_update(at_once=False)
    own = torch.tensor([[5.0, 50.0]])
    before = last.put(own)
    assert before.shape == own.shape
    assert (before + own).tolist() == [[2.0 + 3.0 + 5.0, 20.0 + 30.0 + 50.0]]


def test_the_sums_of_an_update_are_told_apart_by_their_order():
    upper, lower = (CarriedReports(4, torch.device("cpu")) for _ in range(2))
    for _ in range(2):  # each update begins anew
        upper.begin_update(at_once=False)
        upper.put(torch.tensor(1.0))
        upper.put(torch.tensor([2.0, 3.0, 4.0]))
    hand_down(upper, lower)
    lower.begin_update(at_once=False)
    assert lower.put(torch.tensor(0.0)).item() == 1.0
    assert lower.put(torch.zeros(3)).tolist() == [2.0, 3.0, 4.0]


def test_before_the_first_update_sums_are_taken_at_once():
    reports = CarriedReports(1, torch.device("cpu"))
    assert reports.at_once
    reports.begin_update(at_once=False)
    assert not reports.at_once
    assert reports.going_down().tolist() == [0.0]


def test_more_numbers_than_messages_have_room_for_are_refused():
    reports = CarriedReports(2, torch.device("cpu"))
    reports.begin_update(at_once=False)
    reports.put(torch.zeros(1))
    with pytest.raises(UnsupportedError, match="3 numbers are reported in one update, and messages have room for 2"):
        reports.put(torch.zeros(2))

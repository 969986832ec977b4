"""The rule of the guard: which losses are a spike, when that is told, and for how long."""

import math
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from paci_schedule import PipelineSpec
from paci_schedule.runtime import spikes
from paci_schedule.runtime.spikes import WINDOW, SpikeGuard

SPEC = PipelineSpec(stages=4, accumulation=2)  # the first stage is two batches behind


def guard(rise=1.0, updates=3, spec=SPEC, stage=0, **loss):
    alone = SimpleNamespace(size=lambda: 1)
    return SpikeGuard(rise, updates, spec, stage, alone, timedelta(1), loss.get("loss", lambda losses: losses[0]))


def batch(each, loss=None, flushed=False):
    """One batch, with the update that is done in it; whether it was wanted under a flush."""
    wanted = each.wants_flush()
    each.took_batch(flushed)
    if loss is not None:
        each.note(torch.tensor([loss]))
    return wanted


@pytest.fixture(autouse=True)
def rank_0(monkeypatch):
    monkeypatch.setattr(spikes.dist, "get_rank", lambda: 0)


def test_a_loss_far_above_the_median_is_told_when_the_first_stage_has_it_too(caplog):
    each = guard()
    for loss in [3.0, 3.2, 2.8] * 11:
        assert not batch(each, loss)
    assert not batch(each, 4.1)
    assert [batch(each, 3.0) for _ in range(4)] == [False, False, False, True]
    assert "the loss of an update, 4.1, is more than 1 above 3, the median of the 32 updates before it" in caplog.text


@pytest.mark.parametrize("loss", [3.9, -50.0])
def test_a_loss_near_the_median_or_below_it_is_none(loss):
    each = guard()
    wanted = [batch(each, value) for value in [*[3.0] * WINDOW, loss, *[3.0] * 6]]
    assert not any(wanted)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e30])
def test_a_loss_that_is_not_finite_is_a_spike(loss):
    each = guard()
    assert any(batch(each, value) for value in [*[3.0] * WINDOW, loss, *[3.0] * 4])


def test_nothing_is_judged_before_there_is_a_median():
    each = guard()
    assert not any(batch(each, value) for value in [*[3.0] * (WINDOW - 1), 9.0, *[3.0] * 6])


def test_the_flush_lasts_for_as_many_updates_as_were_asked_for():
    each = guard(updates=3)
    for value in [*[3.0] * WINDOW, 9.0, *[3.0] * 3]:
        batch(each, value)
    assert [batch(each, flushed=True) for _ in range(3)] == [True, True, True]
    assert not any(batch(each, 3.0) for _ in range(8))


def test_until_the_pipe_is_empty_the_flush_is_wanted_and_no_second_one_begins():
    each = guard(updates=2)
    for value in [*[3.0] * WINDOW, 9.0, 9.0, 9.0, 9.0]:
        batch(each, value)
    assert [batch(each, 9.0) for _ in range(2)] == [True, True]  # planned, not empty yet
    assert [batch(each, flushed=True) for _ in range(2)] == [True, True]


def test_the_median_follows_a_loss_that_stays_high():
    each = guard(updates=1)
    flushes = 0
    for value in [*[3.0] * WINDOW, *[9.0] * 60]:
        flushed = each.wants_flush()
        each.took_batch(flushed)
        flushes += flushed
        if not flushed:
            each.note(torch.tensor([value]))
    assert 0 < flushes <= WINDOW // 2 + 1


def test_a_guard_goes_on_where_another_one_stopped():
    values = [*[3.0, 3.5] * 18, 9.0, *[3.0] * 8]
    for stop in range(len(values)):
        one = guard()
        straight = [batch(one, value) for value in values]
        first, second = guard(), guard()
        wanted = [batch(first, value) for value in values[:stop]]
        second.load_state(first.state())
        assert wanted + [batch(second, value) for value in values[stop:]] == straight
    second.load_state(spikes.NOTHING_JUDGED)
    assert second.state() == {"left": 0, "before": [], "open": []}


def test_the_loss_may_be_a_quotient_of_what_an_update_tells():
    each = guard(loss=lambda numbers: numbers[0] / numbers[1])
    for total in [*[30.0] * WINDOW, 45.0, *[30.0] * 3]:
        assert not each.wants_flush()
        each.took_batch(False)
        each.note(torch.tensor([total, 10.0]))
    assert each.wants_flush()


def test_more_micro_batches_to_an_update_are_judged_sooner():
    each = guard()
    for value in [*[3.0] * WINDOW, 9.0, 3.0]:
        batch(each, value)
    each.respec(PipelineSpec(stages=4, accumulation=8))
    assert [batch(each, 3.0) for _ in range(2)] == [False, True]

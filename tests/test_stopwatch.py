"""The stopwatch on a device whose events stray from the host's clock."""

import types

import pytest
import torch

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.runtime import stopwatch
from paci_schedule.runtime.stopwatch import Stopwatch

STRAY = 1.001  # the device's seconds in one of the host's
F = Op(OpKind.FORWARD, 0)


class Device:
    """A stream of marks: the host enqueues work, which runs in order from when the device gets to it."""

    def __init__(self):
        self.host = 50.0
        self.free = 50.0  # when all that was enqueued is done

    def compute(self, seconds):
        self.free = max(self.free, self.host) + seconds


@pytest.fixture
def device(monkeypatch):
    one = Device()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(one.free, one.host)

        def query(self):
            return one.host >= self.at

        def elapsed_time(self, end):
            return (end.at - self.at) * STRAY * 1e3

        def synchronize(self):
            assert self.query(), "the host would wait"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stream = types.SimpleNamespace(query=lambda: one.host >= one.free)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: one.host)
    return one


def batch(watch, device, host_ahead):
    """Ten ops of a second, given to the device at once; the caller then does something else."""
    watch.start()
    for _ in range(10):
        device.compute(1.0)
        watch.lap(F)
    device.host = device.free - 2.5 if host_ahead else device.free + 2.5


def last_end(watch):
    return [end for *_, end in watch.spans()][-1]


def test_where_the_device_is_idle_the_chain_begins_anew_at_the_hosts_clock(device):
    watch = Stopwatch(torch.device("cuda"), records=True)
    for _ in range(100):
        batch(watch, device, host_ahead=False)
    assert last_end(watch) - (device.host - 2.5) == pytest.approx(10 * (STRAY - 1), abs=1e-6)
    totals = watch.totals()
    assert totals["F"] == pytest.approx(1000 * STRAY)
    assert sum(totals.values()) == pytest.approx(last_end(watch) - 50.0)


def test_the_callers_own_work_on_the_device_is_no_idleness(device):
    watch = Stopwatch(torch.device("cuda"), records=True)
    for _ in range(20):
        batch(watch, device, host_ahead=False)
        device.compute(4.0)  # an optimizer's step that is under way when the next batch begins
    device.host = device.free
    starts = [start for _, start, _ in watch.spans()][::10]
    assert starts[1] - starts[0] == pytest.approx((10.0 + 2.5 + 4.0) * STRAY)


def test_while_the_device_has_work_the_host_does_not_wait_and_the_chain_goes_on(device):
    watch = Stopwatch(torch.device("cuda"), records=True)
    for _ in range(20):
        batch(watch, device, host_ahead=True)
    device.host = device.free
    assert last_end(watch) == pytest.approx(50.0 + 200 * STRAY)
    assert watch.totals()["F"] == pytest.approx(200 * STRAY)

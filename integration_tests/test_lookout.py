"""Where waiting for a message returns at once, the lookout says which one does not come, before the process ends."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.runtime.links import Links
from paci_schedule.runtime.lookout import Lookout
from testing.ranks import gather_outcomes, on_gpus


class AtOnce(dist.Work):
    """A message whose wait returns at once, as on NCCL; it has come when `come` says so."""

    def __init__(self, come=False):
        super().__init__()
        self.come = come

    def wait(self, timeout=timedelta(0)):
        return True

    def is_completed(self):
        return self.come


def lose_the_gradient(folder):
    """Stage 0's transport waits at once; the gradient of micro-batch 1 never comes, and the process is aborted."""
    links = Links(
        [[0, 1]],
        torch.device("cpu"),
        timedelta(seconds=1.0),
        lost=lambda error: Path(folder, "lost").write_text(f"{error.ranks} {error}"),
        looks_out=dist.get_rank() == 0,
    )
    payload = torch.ones(3)
    forwards = [Op(OpKind.SEND_ACTIVATION, index) for index in range(2)]
    if dist.get_rank() == 1:
        for index in range(2):
            links.expect_activation(Op(OpKind.EXPECT_ACTIVATION, index))
            links.recv_activation(Op(OpKind.RECV_ACTIVATION, index))
            if index == 0:
                links.send_gradient(Op(OpKind.SEND_GRADIENT, index), payload, ())
        links.finish()
        return
    for index, forward in enumerate(forwards):
        links.send_activation(forward, payload, ())
        if index == 1:
            dist.irecv = lambda *_, **__: AtOnce()
        links.expect_gradient(Op(OpKind.EXPECT_GRADIENT, index))
        links.recv_gradient(Op(OpKind.RECV_GRADIENT, index))
    time.sleep(4.0)
    os.abort()


@pytest.mark.skipif(on_gpus(2), reason="the messages are on the host")
def test_a_process_that_is_aborted_has_said_what_it_waited_for(tmp_path):
    lost, peer = gather_outcomes(lose_the_gradient, 2, (str(tmp_path),), timeout=180, grace=5)
    assert lost.ended == "died", lost
    told = [line for line in lost.output.splitlines() if "got no answer" in line]
    assert len(told) == 1, lost.output
    said = "stage 0 (rank 0) waited (RG1) for the gradient of micro-batch 1 from stage 1 (rank 1) and got no answer"
    assert said in told[0]
    assert "the timeout of 1 s" in told[0]
    assert told[0].endswith("EG0, RG0, SA1, EG1, RG1"), told[0]
    assert Path(tmp_path, "lost").read_text().startswith(f"(1,) {said}")
    assert "got no answer" not in peer.output


@pytest.fixture
def lookout(monkeypatch):
    """A lookout whose thread never looks, with a timeout of 20 s and a clock; what it has told."""
    monkeypatch.setattr(dist, "get_rank", lambda: 6)
    one = Lookout(2, torch.device("cpu"), timedelta(seconds=20), interval=1e6)
    one.clock = time.monotonic() + 1000.0
    one.told = []
    monkeypatch.setattr("paci_schedule.runtime.lookout.time.monotonic", lambda: one.clock)
    monkeypatch.setattr("paci_schedule.runtime.lookout.logger.error", one.told.append)
    return one


def look(lookout, seconds):
    """Do what the thread does, once a second for so long."""
    for _ in range(seconds):
        lookout.clock += 1.0
        lookout._glance()


def test_the_age_counts_from_when_a_message_became_the_oldest(lookout):
    works = [AtOnce() for _ in range(4)]
    for index, work in enumerate(works):
        lookout.expect(f"waited (RA{index}) for the activation of micro-batch {index} from", 1, 5, work)
    for work in works[:3]:  # the device is 15 s behind the host with each
        look(lookout, 15)
        work.come = True
    look(lookout, 15)
    assert not lookout.told
    look(lookout, 10)
    (line,) = lookout.told
    assert line.startswith("stage 2 (rank 6) waited (RA3) for the activation of micro-batch 3 from stage 1 (rank 5) ")
    look(lookout, 100)
    assert len(lookout.told) == 1


def test_a_stage_with_nothing_to_wait_for_reports_nothing(lookout):
    lookout.expect("waited (RA0) for", 1, 5, AtOnce(come=True))
    look(lookout, 100)
    assert not lookout.told


def test_messages_that_have_come_are_let_go_of_by_the_next(lookout):
    late = AtOnce()
    lookout.expect("waited (RA0) for", 1, 5, late)
    lookout.expect("waited (RG0) for", 3, 7, AtOnce(come=True))
    assert len(lookout._waits) == 2
    late.come = True
    lookout.expect("waited (RA1) for", 1, 5, AtOnce())
    assert len(lookout._waits) == 1


def test_the_device_is_not_asked_while_the_host_goes_on(lookout):
    work = AtOnce()
    lookout.expect("waited (RA0) for", 1, 5, work)
    lookout._let_go = lambda: pytest.fail("asked")
    look(lookout, 1)


def default_links():
    links = Links([[0, 1]], torch.device("cpu"), timedelta(seconds=20))
    return links._lookout is None


@pytest.mark.skipif(on_gpus(2), reason="the default group is NCCL's")
def test_there_is_no_lookout_on_gloo():
    assert [outcome.value for outcome in gather_outcomes(default_links, 2, timeout=180)] == [True, True]

"""Ops print and parse, so that a schedule round-trips as text."""

import pytest

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.errors import ScheduleError


@pytest.mark.parametrize("kind", list(OpKind))
@pytest.mark.parametrize("index", [0, 3, 12])
@pytest.mark.parametrize("chunk", [0, 2])
def test_every_op_parses_as_it_prints(kind, index, chunk):
    op = Op(kind, index, chunk)
    assert Op.parse(str(op)) == op


def test_ops_print_as_documented():
    ops = [
        Op(OpKind.FORWARD, 3),
        Op(OpKind.BACKWARD, 0),
        Op(OpKind.STEP, 1),
        Op(OpKind.WEIGHT, 7, 1),
        Op(OpKind.RECV_ACTIVATION, 3),
        Op(OpKind.SEND_GRADIENT, 10),
        Op(OpKind.FORWARD, 3, 1),
    ]
    assert " ".join(map(str, ops)) == "F3 B0 STEP1 W7.1 RA3 SG10 F3.1"


def test_no_two_kinds_print_the_same():
    assert len({str(Op(kind, 5)) for kind in OpKind}) == len(OpKind)


def test_compute_ops_and_messages_are_told_apart():
    compute = {kind for kind in OpKind if kind.is_compute}
    assert compute == {OpKind.FORWARD, OpKind.BACKWARD, OpKind.WEIGHT, OpKind.STEP}


@pytest.mark.parametrize("text", ["", "F", "3", "X3", "f3", "F-1", "F 3", "F3.", "F.1", "F3.x", "STEP", "F3 B0"])
def test_bad_text_is_refused_by_name(text):
    with pytest.raises(ScheduleError) as caught:
        Op.parse(text)
    assert repr(text) in str(caught.value)
    assert "STEP" in str(caught.value)
    assert "for example F3" in str(caught.value)

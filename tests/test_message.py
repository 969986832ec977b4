"""The header that brings a message's layout before the message."""

import pytest
import torch

from paci_schedule import UnsupportedError
from paci_schedule.runtime.message import HEADER, Layout


@pytest.mark.parametrize(
    "payload", [torch.zeros(3, 5), (torch.zeros(2, dtype=torch.bfloat16), torch.zeros((), dtype=torch.int64))]
)
def test_a_layout_travels_in_a_header_of_known_size(payload):
    layout = Layout.of(payload, (torch.zeros(7),))
    header = layout.header()
    assert header.shape == (HEADER,)
    assert Layout.from_header(header) == layout


def test_a_layout_that_does_not_fit_is_refused():
    many = tuple(torch.empty(number, 1000 + number, device="meta") for number in range(4000))
    with pytest.raises(UnsupportedError, match="4000 tensors between two stages"):
        Layout.of(many).header()


def test_a_layout_shows_all_that_makes_it_differ_from_another():
    payload, losses = torch.zeros(3, 5), torch.zeros(2)
    assert str(Layout.of(payload)) == "float32[3, 5]"
    assert str(Layout.of((payload,), (losses,))) == "a tuple (float32[3, 5]) with losses and norms in float32[2]"

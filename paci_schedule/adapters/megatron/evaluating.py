"""The messages of Megatron-core's own schedule, which end in time, and with the name of the rank that did not answer.

On gloo a message lasts as long as its group was told to when the group was made.  On CUDA nothing changes: there the
host would have to wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from megatron.core.pipeline_parallel import p2p_communication

from paci_schedule.runtime.waiting import waiting

__all__ = ["timed_messages"]


@contextmanager
def timed_messages(doing: str, stage: int, device: torch.device, timeout: timedelta) -> Iterator[None]:
    """While it lasts, no message that this rank sends or receives takes longer than `timeout`.

    Args:
        doing: what this rank does meanwhile: "evaluated".
        stage: this rank's.
        device: where the stage computes.
        timeout: of one message.
    """
    names = ("_batched_p2p_ops", "_p2p_ops")
    stock = {name: getattr(p2p_communication, name) for name in names}

    def timed(begin: Callable[..., Any]) -> Callable[..., Any]:
        def begun(**call: Any) -> Any:
            works = begin(**call)
            peers = [
                call[f"{side}_pipeline_rank"]
                for side in ("prev", "next")
                if any(call[f"tensor_{way}_{side}"] is not None for way in ("send", "recv"))
            ]
            if isinstance(works, list):
                return [_Timed(work, doing, stage, peers, timeout) for work in works]
            return {name: _Timed(work, doing, stage, peers, timeout) for name, work in works.items()}

        return begun

    for name in names if device.type != "cuda" else ():
        setattr(p2p_communication, name, timed(stock[name]))
    try:
        yield
    finally:
        for name in names:
            setattr(p2p_communication, name, stock[name])


class _Timed:
    """A message under way, waited for no longer than `timeout`."""

    def __init__(self, work: Any, doing: str, stage: int, peers: list[int], timeout: timedelta) -> None:
        self._work, self._doing = work, doing
        self._stage, self._peers, self._timeout = stage, peers, timeout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self) -> bool:
        doing = f"{self._doing}, and exchanged a message with"
        with waiting(self._stage, doing, "the neighbouring stage", self._peers, self._timeout):
            return self._work.wait(self._timeout)

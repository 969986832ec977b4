"""What the other ranks say, and when they end, after one has died or hangs in the middle of training over NCCL."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.gpu.place import Place
from integration_tests import deepspeed_job, jobs
from integration_tests.jobs import Job
from integration_tests.ranks import gather_outcomes

__all__ = ["run"]

_TIMEOUT = 10.0  # seconds that a stage may take to answer
_STAGES, _LOST, _AT = 3, 1, 6
_MARGIN = 60.0  # seconds in which the transport's own watchdog must have ended the others


def run(place: Place) -> dict[str, Any]:
    """By how the rank was lost, how the others ended and their last words; raises where nobody named the lost stage."""
    figures: dict[str, Any] = {}
    limit = min(_TIMEOUT + _MARGIN, place.seconds / 2 - 5)
    for how in ("dies", "hangs"):
        outcomes = gather_outcomes(_lose, _STAGES, (how,), timeout=limit + 20, grace=limit)
        others = [outcome for outcome in outcomes if outcome.rank != _LOST]
        for outcome in others:
            words = f"{outcome.output}\n{outcome.error}"
            named = [line for line in words.splitlines() if f"stage {_LOST}" in line and "waited" in line]
            figures[f"rank {_LOST} {how}: rank {outcome.rank}"] = f"{outcome.ended} after {outcome.seconds:.0f} s"
            figures[f"rank {_LOST} {how}: rank {outcome.rank} says"] = named[-1][-400:] if named else words[-400:]
        if not any(f"stage {_LOST}" in figures[f"rank {_LOST} {how}: rank {outcome.rank} says"] for outcome in others):
            raise AssertionError(f"no rank named stage {_LOST}: {figures}")
    return figures


def _lose(how: str) -> None:
    engine = deepspeed_job.build(
        Job(stages=_STAGES, accumulation=2, script=(), config={"paci": {"timeout": _TIMEOUT}})
    )
    if engine.stage_id == _LOST:
        forwards: list[int] = []

        def stop(*_: Any) -> None:
            forwards.append(1)
            if len(forwards) == _AT:
                os._exit(9) if how == "dies" else time.sleep(600)

        engine.module.forward_funcs[0].register_forward_pre_hook(stop)
    feed = jobs.data("words")
    while True:
        engine.train_batch(feed).item()

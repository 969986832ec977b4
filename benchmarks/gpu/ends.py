"""What the other ranks say, and when they end, after one has died or hangs in the middle of training over NCCL."""

from __future__ import annotations

import os
import re
import time
from typing import Any

from benchmarks.gpu.place import Failed, Place
from paci_schedule.runtime.waiting import WATCHDOG_MARGIN
from testing import deepspeed_job, jobs
from testing.jobs import Job
from testing.ranks import gather_outcomes

__all__ = ["run"]

_STAGES, _LOST, _AT = 3, 1, 6


def run(place: Place) -> dict[str, Any]:
    """By how the rank was lost, how the others ended and their last words; raises where nobody named one that hangs.

    Where a rank dies and NCCL's transport notices, as between ranks that share a GPU, it ends the others without a word
    of ours.
    """
    figures: dict[str, Any] = {}
    timeout = 3.0 if place.dry else 10.0
    # On NCCL, the watchdog must have ended the others by then.
    limit = timeout + (2.0 if place.dry else WATCHDOG_MARGIN.total_seconds() + 30.0)
    for how in ("dies", "hangs"):
        outcomes = gather_outcomes(_lose, _STAGES, (how, timeout), timeout=0.6 * place.seconds, grace=limit)
        others = [outcome for outcome in outcomes if outcome.rank != _LOST]
        named = []
        for outcome in others:
            words = f"{outcome.output}\n{outcome.error}"
            sentence = rf"stage {outcome.rank} \(rank .* stage {_LOST} \(rank {_LOST}\) and got no answer"
            found = re.search(sentence, words)
            figures[f"rank {_LOST} {how}: rank {outcome.rank}"] = f"{outcome.ended} after {outcome.seconds:.0f} s"
            figures[f"rank {_LOST} {how}: rank {outcome.rank} says"] = found[0] if found else words[-400:]
            named.append(found is not None)
        if not any(named) and (place.dry or how == "hangs"):
            raise Failed(f"no rank named stage {_LOST}, which {how}", figures)
    return figures


def _lose(how: str, timeout: float) -> None:
    engine = deepspeed_job.build(Job(stages=_STAGES, accumulation=2, script=(), config={"paci": {"timeout": timeout}}))
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

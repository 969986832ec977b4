"""The written rules about what arrives late by design: which gradient norm and which tied sum an update applies.

P is the number of stages, a the micro-batches to an update, and d_s the look-ahead of stage s: how many micro-batches
it runs ahead of its own backwards.  Updates and micro-batches are counted from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["look_aheads", "norm_update", "tied_delay", "tied_updates"]


def look_aheads(stages: int, extra: int | Sequence[int] = 0) -> list[int]:
    """d of every stage: P - 1 - s, and the slack of the links from this stage on.

    Args:
        stages: P.
        extra: micro-batches of slack at every link; or of the first stage, of which a stage has a share in proportion
            to its distance from the end, rounded up.
    """
    last = stages - 1
    if isinstance(extra, int):
        return [last - stage + (math.ceil(extra * (last - stage) / last) if last else 0) for stage in range(stages)]
    return [last - stage + sum(extra[stage:]) for stage in range(stages)]


def norm_update(
    update: int,
    stage: int,
    other: int,
    *,
    ahead: Sequence[int],
    accumulation: int,
    emptied: int,
    taken: int,
    agreed: bool = False,
    flushing: bool = False,
) -> int:
    """The update whose squared norm stage `other` contributes to the norm of `update` at `stage`; below 0 for none.

    Under a flush that is the update itself, and so it is for the stage's own norm.  Otherwise a later stage
    contributes the update before.  An earlier stage contributes its last update before it made the activation that
    `stage` got last: in steady state that of micro-batch (end of the update) + d_s, in a drain the last one of all.

    Args:
        update, stage, other: as above.
        ahead: d of every stage.
        accumulation: a.
        emptied: updates that were done when the pipe was last empty.
        taken: micro-batches that have entered the pipe since then.
        agreed: whether the stage has to take the same norm as the others, since it holds a weight that is tied to
            theirs; then all stages contribute the same update, the last that everyone knows of.
        flushing: whether the pipe is emptied at every update.
    """
    if flushing:
        return update
    if agreed:
        return update - math.ceil((ahead[0] + 1) / accumulation)
    if other == stage:
        return update
    if other > stage:
        return update - 1
    end = (update + 1 - emptied) * accumulation - 1
    received = min(end + ahead[stage], taken - 1)
    return emptied + max(0, received - ahead[other]) // accumulation - 1


def tied_delay(first: int, last: int, *, ahead: Sequence[int], accumulation: int) -> int:
    """j: how many updates after its own the sum of a tied weight's gradients is applied.

    Args:
        first, last: the outermost stages that hold a copy of the weight.
        ahead: d of every stage.
        accumulation: a.
    """
    return math.ceil((ahead[first] - ahead[last]) / accumulation)


def tied_updates(update: int, applied: int, delay: int, *, flushing: bool = False) -> list[int]:
    """The updates whose sums of tied gradients `update` applies, in the order in which they are added up.

    These are all up to `update` - `delay` that have not been applied, oldest first.  Under a flush they are the
    update's own and then all others that have not been applied.

    Args:
        update: the one that is about to be done.
        applied: the sums of the updates before this one have been applied.
        delay: j.
        flushing: whether the pipe is emptied at every update.
    """
    if flushing:
        return [update, *range(applied, update)]
    return list(range(applied, update - delay + 1))

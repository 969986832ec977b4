"""Predictions where DeepSpeed keeps fp32 masters: BF16_Optimizer and ZeRO stage 1.

A prediction is written into the working weights, cast as an update casts it; the masters stay, so nothing needs to be
kept.  The masters are flat and are stepped in pieces, so that there is never a copy of all of them either.

Each of a stage's replicas holds a shard of the masters.  It predicts that one, from the part that it has itself, and
the replicas gather what they have predicted, as they gather what an update leaves.

A step averages its gradients over the replicas in their own dtype, or rounds them to the communication's, before it
casts them to fp32; a prediction takes this replica's as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.optim import Optimizer

from paci_schedule.adapters.deepspeed.shards import flat_weights, gather, shards_of
from paci_schedule.predict import advance, expected_gradient, piece_of
from paci_schedule.predict.copies import copied, write
from paci_schedule.predict.shadow import PIECE
from paci_schedule.runtime.deferred.tied import drop_overflow

__all__ = ["MasterWeights"]


class MasterWeights:
    """The working weights of a stage (`predict.Weights`).

    Args:
        optimizer: of the stage.
        stepped: what it wraps, as one that `predict.check` lets pass.
        deferred: parameters that are predicted from what their momentum expects (`predict.SteppedWeights`).
        gathering: the context in which the stage's replicas wait for each other.
    """

    def __init__(
        self,
        optimizer: BF16_Optimizer | DeepSpeedZeroOptimizer,
        stepped: Optimizer,
        deferred: Collection[torch.nn.Parameter],
        gathering: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._optimizer, self._stepped, self._deferred, self._gathering = optimizer, stepped, deferred, gathering
        self._is_predicted = False
        self._away: list[torch.Tensor] | None = None  # the predicted weights, while the real ones are shown

    @torch.no_grad()
    def predict(self, windows: int, scale: float, factor: torch.Tensor | None, reach: float) -> None:
        """As `Weights.predict`, by the wrapped optimizer's own step."""
        shards = shards_of(self._optimizer, self._deferred)
        for group, shard in zip(self._stepped.param_groups, shards, strict=True):
            for start in range(0, shard.master.numel(), PIECE):
                at = slice(start, start + PIECE)
                piece = piece_of(self._stepped, group, shard.master, at)
                part = _part(shard.part(at), scale, factor) if scale else None
                predicted = _next(piece, part, _within(at, shard.deferred), windows, reach)
                shard.working.data[at].copy_(predicted.to(shard.working.dtype))
        with self._gathering():
            gather(self._optimizer)
        self._is_predicted = True

    def restore(self) -> None:
        """As `Weights.restore`."""
        if self._is_predicted:
            with self._gathering():
                self._optimizer.update_lp_params()
            self._is_predicted = False

    def exchange(self) -> None:
        """As `Weights.exchange`."""
        working = flat_weights(self._optimizer)
        if self._away is not None:
            write(working, self._away)
            self._away, self._is_predicted = None, True
        elif self._is_predicted:
            self._away = copied(working)
            self.restore()


def _within(at: slice, places: list[slice]) -> list[slice]:
    """The part of these places that lies at this one, counted from its start."""
    moved = [slice(max(place.start, at.start) - at.start, min(place.stop, at.stop) - at.start) for place in places]
    return [place for place in moved if place.start < place.stop]


def _part(part: torch.Tensor, scale: float, factor: torch.Tensor | None) -> torch.Tensor:
    part.mul_(scale)
    if factor is not None:
        part.mul_(factor.to(part.device))  # that of an offloaded optimizer may have come with a checkpoint
    # The update would be skipped.  A prediction that is not finite would spoil the next window's gradients as well, and
    # through their prediction all that come after them.
    drop_overflow([part])
    return part


def _next(
    piece: Optimizer, part: torch.Tensor | None, deferred: list[slice], windows: int, reach: float
) -> torch.Tensor:
    """Where the optimizer's next steps take its only parameter, from this part or from what its momentum expects.

    Deferred elements go where the momentum expects; where it expects nothing, they stay.
    """
    (group,) = piece.param_groups
    (weight,) = group["params"]
    value, stays = weight.clone(), []
    if part is None:
        part = _expected(piece)
    else:
        for place in deferred:
            expected = _expected(piece_of(piece, group, weight, place))
            if expected is None:
                stays.append(place)
            else:
                part[place] = expected
    if part is not None:
        advance(piece, {weight: value}, {weight: part}, windows, reach)
    for place in stays:
        value[place] = weight[place]
    return value


def _expected(piece: Optimizer) -> torch.Tensor | None:
    """What the momentum expects for the optimizer's only parameter."""
    (group,) = piece.param_groups
    (weight,) = group["params"]
    return expected_gradient(piece, group, weight, weight)

"""Predictions under DeepSpeed's BF16_Optimizer: low-precision weights, whose real values are its fp32 masters.

A prediction is written into the working weights, cast as an update casts it; the masters stay, so nothing needs to be
kept.  The masters are flat, and are gone through in pieces, so that no copy of them all is made either.

Each of a stage's replicas holds a shard of the masters.  It predicts that one, from the part that it has itself, and
the replicas gather what they have predicted, as they gather what an update leaves.

A step rounds its gradients to the communication's dtype before, even where nobody is communicated with; a prediction
takes them as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups

from paci_schedule.predict import advance, expected_gradient, piece_of
from paci_schedule.predict.copies import copied, write
from paci_schedule.predict.shadow import PIECE
from paci_schedule.runtime.tied import drop_overflow

__all__ = ["MasterWeights"]


class MasterWeights:
    """The working weights of a stage (`predict.Weights`).

    Args:
        optimizer: of the stage; what it wraps is one that `predict.check` lets pass.
        gathering: within it the stage's replicas wait for each other.
    """

    def __init__(self, optimizer: BF16_Optimizer, gathering: Callable[[], AbstractContextManager[None]]) -> None:
        self._optimizer, self._gathering = optimizer, gathering
        self._is_predicted = False
        self._away: list[torch.Tensor] | None = None  # the predicted weights, while the real ones are shown

    @torch.no_grad()
    def predict(self, windows: int, scale: float, factor: torch.Tensor | None) -> None:
        """As `Weights.predict`, by the wrapped optimizer's own step."""
        optimizer, wrapped = self._optimizer, self._optimizer.optimizer
        for group, shards, master, total in zip(
            wrapped.param_groups,
            optimizer.bf16_partitioned_groups,
            optimizer.fp32_groups_flat_partition,
            optimizer.fp32_groups_gradient_flat_partition,
            strict=True,
        ):
            working = shards[optimizer.dp_rank]
            for start in range(0, master.numel(), PIECE):
                cut = slice(start, start + PIECE)
                piece = piece_of(wrapped, group, master, cut)
                part = _part(total[cut], scale, factor) if scale else None
                working.data[cut].copy_(_next(piece, part, windows))
        with self._gathering():
            all_gather_dp_groups(
                groups_flat=optimizer.bf16_groups_flat,
                partitioned_param_groups=optimizer.bf16_partitioned_groups,
                dp_process_group=optimizer.real_dp_process_group,
                start_alignment_factor=optimizer.nccl_start_alignment_factor,
                allgather_bucket_size=optimizer.allgather_bucket_size,
            )
        self._is_predicted = True

    def restore(self) -> None:
        """As `Weights.restore`."""
        if self._is_predicted:
            with self._gathering():
                self._optimizer.update_lp_params()
            self._is_predicted = False

    def exchange(self) -> None:
        """As `Weights.exchange`."""
        working = self._optimizer.bf16_groups_flat
        if self._away is not None:
            write(working, self._away)
            self._away, self._is_predicted = None, True
        elif self._is_predicted:
            self._away = copied(working)
            self.restore()


def _part(total: torch.Tensor, scale: float, factor: torch.Tensor | None) -> torch.Tensor:
    part = total.to(torch.float32, copy=True).mul_(scale)
    if factor is not None:
        part.mul_(factor)
    # The update would be skipped.  A prediction that is not finite would spoil the next window's gradients as well, and
    # through their prediction all that come after them.
    drop_overflow([part])
    return part


def _next(piece: Any, part: torch.Tensor | None, windows: int) -> torch.Tensor:
    """Where the optimizer's next steps take its only parameter, from this part or from what its momentum expects."""
    (group,) = piece.param_groups
    (weight,) = group["params"]
    value = weight.clone()
    gradient = expected_gradient(piece, group, weight, weight) if part is None else part
    if gradient is not None:
        advance(piece, {weight: value}, {weight: gradient}, windows)
    return value

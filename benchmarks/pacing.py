"""Stages whose ops take a fixed time, so that any machine shows what a schedule does."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Pace", "PacedLayer", "Pacing", "add_pacing", "micro_batches", "pacing_of"]


class Pace(torch.autograd.Function):
    """The identity, in `forward` seconds; its gradient, in `backward` seconds."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradient, None, None


class PacedLayer(torch.nn.Module):
    """A stage whose forward and backward take a fixed time, in seconds."""

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))
        self.seconds = forward, backward

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return Pace.apply(values * self.weight, *self.seconds)


def micro_batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless inputs and labels of paced layers."""
    return itertools.repeat((torch.ones(1, 8), torch.zeros(1, 8)))


@dataclass(frozen=True, kw_only=True)
class Pacing:
    """What a race of paced engines has in common; times in seconds.

    Attributes:
        stages: P.
        accumulation: a.
        forward, backward: of a stage and a micro-batch.
        latency: that every message takes longer.
        batches: in a turn.
        turns: of each engine.
    """

    stages: int
    accumulation: int
    forward: float
    backward: float
    latency: float
    batches: int
    turns: int


def add_pacing(parser: argparse.ArgumentParser) -> None:
    """Add the options of paced stages and of the race, without the size of the pipeline."""
    parser.add_argument("--forward", type=float, default=40.0, help="milliseconds")
    parser.add_argument("--backward", type=float, default=80.0, help="milliseconds")
    parser.add_argument("--batches", type=int, default=4, help="batches in a turn")
    parser.add_argument("--turns", type=int, default=2, help="turns of each engine")
    parser.add_argument("--json", help="file to write the rows to")


def pacing_of(arguments: argparse.Namespace, latency: float) -> dict[str, Any]:
    """The fields of `Pacing`, without the size of the pipeline; `latency` in milliseconds."""
    seconds = {"forward": arguments.forward / 1e3, "backward": arguments.backward / 1e3, "latency": latency / 1e3}
    return {**seconds, "batches": arguments.batches, "turns": arguments.turns}

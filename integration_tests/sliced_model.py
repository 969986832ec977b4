"""A model whose layers are cut over tensor-parallel ranks, and the same model in one piece."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from testing import jobs

__all__ = ["layers", "shard_of", "use_group"]

_WIDTH, _HIDDEN, _WORDS = 8, 12, 13


class _Enter(torch.autograd.Function):
    """Identity; its gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Leave(torch.autograd.Function):
    """The sum over the group; its gradient is handed on."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class SlicedMLP(nn.Module):
    """x + down(tanh(up(norm(x)))): `up` is cut by output features, `down` by input features.

    Args:
        rank, world: which slice of how many.
    """

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        up, down = 0.4 * torch.randn(_HIDDEN, _WIDTH), 0.4 * torch.randn(_WIDTH, _HIDDEN)
        self.up = nn.Parameter(shard_of("up", up, rank, world))
        self.down = nn.Parameter(shard_of("down", down, rank, world))
        self.group: dist.ProcessGroup | None = None
        for parameter in (self.up, self.down):
            parameter.model_parallel = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.norm(x)
        if self.group is not None:
            inner = _Enter.apply(inner, self.group)
        partial = torch.tanh(inner @ self.up.T) @ self.down.T
        return x + (partial if self.group is None else _Leave.apply(partial, self.group))


def shard_of(name: str, weight: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """What slice `rank` of `world` holds of a weight, by the weight's name."""
    kind = name.rpartition(".")[2]
    return weight.chunk(world, {"up": 0, "down": 1}[kind])[rank].clone() if kind in ("up", "down") else weight


def layers(rank: int = 0, world: int = 1) -> list[nn.Module]:
    """Slice `rank` of `world` of a model with as many layers as those of `jobs`."""
    built: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        for number in range(jobs.LAYERS):
            torch.manual_seed(700 + number)
            if number == 0:
                built.append(nn.Embedding(_WORDS, _WIDTH))
            elif number == jobs.LAYERS - 1:
                built.append(nn.Linear(_WIDTH, _WORDS))
            else:
                built.append(SlicedMLP(rank, world))
    return built


def use_group(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Tell every sliced layer which ranks hold its other slices."""
    for layer in module.modules():
        if isinstance(layer, SlicedMLP):
            layer.group = group

"""A small GPT in stages for rehearsals: pre-norm blocks, causal attention, no dropout, untied embedding and head."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from paci_schedule.errors import ConfigError

__all__ = ["hidden_matrices", "stages"]

_HEAD = 12  # features of an attention head


def stages(count: int, layers: int, width: int, context: int, vocabulary: int, seed: int) -> list[nn.Sequential]:
    """The model in `count` stages with numbers of blocks that differ by at most one; the first stages have more.

    A stage maps float[batch, time, width] to float[batch, time, width].  The input of the first stage is int64[batch,
    time], and the output of the last stage float[batch, time, vocabulary].

    Raises:
        ConfigError: there are fewer layers than stages, or the width cannot be divided into heads.
    """
    if layers < count:
        raise ConfigError(
            f"layers={layers}: {count} stages need at least one layer each; take more layers or fewer stages"
        )
    if width % _HEAD:
        raise ConfigError(f"width={width}: must be a multiple of {_HEAD}, the width of an attention head")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [_Block(width, layers) for _ in range(layers)]
        parts = [_Embedding(vocabulary, context, width), *blocks, _head(width, vocabulary)]
    each, longer = divmod(layers, count)
    bounds = [0, *(1 + (number + 1) * each + min(number + 1, longer) for number in range(count))]
    bounds[-1] += 1
    return [nn.Sequential(*parts[start:stop]) for start, stop in itertools.pairwise(bounds)]


def hidden_matrices(stage: nn.Sequential) -> list[nn.Parameter]:
    """The matrices of a stage's blocks, which Muon is meant for."""
    blocks = (part for part in stage if isinstance(part, _Block))
    return [parameter for block in blocks for parameter in block.parameters() if parameter.ndim == 2]


class _Embedding(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tokens(ids) + self.places.weight[: ids.shape[1]]


class _Block(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        residual = 0.02 / math.sqrt(2 * layers)  # so that the sum over the layers keeps its size
        for linear, spread in (
            (self.queries_keys_values, 0.02),
            (self.attended, residual),
            (self.up, 0.02),
            (self.down, residual),
        ):
            nn.init.normal_(linear.weight, std=spread)
            if linear.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]: without a bias it is None
                nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        mixed = self.queries_keys_values(self.before_attention(x))
        query, key, value = mixed.view(batch, time, 3, width // _HEAD, _HEAD).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(seen.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(nn.functional.gelu(self.up(self.before_mlp(x))))


def _head(width: int, vocabulary: int) -> nn.Module:
    linear = nn.Linear(width, vocabulary, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    return nn.Sequential(nn.LayerNorm(width), linear)

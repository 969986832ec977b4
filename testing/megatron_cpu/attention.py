"""What only Transformer Engine's attention does, in Megatron's own attention, for the tests.

These are sequences that are spread over ranks (context parallelism), and values of another width than the keys
(multi-latent attention).
"""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["install"]


def install() -> None:
    """Let Megatron's `DotProductAttention` take both.  Imports Megatron-core."""
    module = importlib.import_module("megatron.core.transformer.dot_product_attention")
    kind: Any = module.DotProductAttention
    stock_init, stock_forward = kind.__init__, kind.forward

    @functools.wraps(stock_init)
    def init(
        self: Any, config: Any, *rest: Any, k_channels: int | None = None, v_channels: int | None = None, **named: Any
    ) -> None:
        whole = copy.copy(config)
        whole.context_parallel_size = 1  # which is all that the stock one takes
        stock_init(self, whole, *rest, **named)
        self.config, self.spread = config, config.context_parallel_size > 1
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    @functools.wraps(stock_forward)
    def forward(
        self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any
    ) -> Any:
        if not self.spread:
            return stock_forward(self, query, key, value, *rest, **named)
        group = importlib.import_module("megatron.core.parallel_state").get_context_parallel_group()
        whole = [_Whole.apply(part, group) for part in (query, key, value)]
        return _own(stock_forward(self, *whole, *rest, **named), group)

    kind.__init__, kind.forward = init, forward
    latent = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    latent.HAVE_TE = isinstance(latent.TELinear, type)  # of which megatron-core 0.16.1 is mistaken


def _places(group: dist.ProcessGroup) -> list[int]:
    """Which chunks of a sequence the ranks of the group hold, rank by rank: an early one and a late one each."""
    count = 2 * group.size()
    return [place for rank in range(group.size()) for place in (rank, count - 1 - rank)]


def _own(whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part of a whole sequence [s, ...]."""
    chunks, places = whole.chunk(2 * group.size()), _places(group)
    return torch.cat([chunks[place] for place in places[2 * group.rank() : 2 * group.rank() + 2]])


class _Whole(torch.autograd.Function):
    """The whole sequence of which each rank has a part [s / size, ...]; its gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        chunks = [chunk for other in parts for chunk in other.chunk(2)]
        ordered = sorted(zip(_places(group), chunks, strict=True), key=lambda placed: placed[0])
        return torch.cat([chunk for _, chunk in ordered])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return _own(total, ctx.group), None

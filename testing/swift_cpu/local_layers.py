"""What mcore-bridge, which builds ms-swift's models, asks of Transformer Engine, where there is none.

Megatron-core's local layers compute the same; their weights get the names by which mcore-bridge loads and saves them.
"""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from testing import stand_ins


def install() -> None:
    """Let mcore-bridge find what it asks for; before it is imported."""
    stand_ins.install("mcore_bridge", (), ("transformer_engine",))
    extensions: Any = import_module("megatron.core.extensions.transformer_engine")
    for name in ("TELinear", "TEGroupedLinear", "TELayerNormColumnParallelLinear", "TEFusedMLP"):
        setattr(extensions, name, type(name, (torch.nn.Module,), {}))
    register: Any = import_module("mcore_bridge.model.register")
    stock = register.get_gpt_decoder_block_spec

    def local_spec(config: Any, use_transformer_engine: bool, **named: Any) -> Any:
        """Megatron-core's local layers, with the names that Transformer Engine's weights have."""
        from megatron.core.transformer.identity_op import IdentityOp

        block = stock(config, use_transformer_engine=False, **named)
        block.layer_specs = [deepcopy(each) for each in block.layer_specs]
        for layer in block.layer_specs:
            parts = layer.submodules
            parts.input_layernorm = IdentityOp
            parts.self_attention.submodules.core_attention = Attention
            parts.self_attention.submodules.linear_qkv = _normed()
            if hasattr(parts.mlp.submodules, "linear_fc1"):  # experts have their norm before the router
                parts.pre_mlp_layernorm = IdentityOp
                parts.mlp.submodules.linear_fc1 = _normed()
        return block

    register.get_gpt_decoder_block_spec = local_spec
    bridge: Any = import_module("mcore_bridge.bridge")
    bridge.GPTBridge._set_moe_state = lambda *_, **__: {}  # experts in one matrix: these here keep what they began with


def _normed() -> type:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    class Normed(ColumnParallelLinear):
        """A linear layer with the norm before it in one, as `TELayerNormColumnParallelLinear`."""

        def __init__(self, input_size: int, output_size: int, *, config: Any, **named: Any) -> None:
            super().__init__(input_size, output_size, config=config, **named)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))

        def forward(self, input_: torch.Tensor, *rest: Any, **named: Any) -> Any:
            normed = F.rms_norm(input_, input_.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon)
            return super().forward(normed, *rest, **named)

    return Normed


class Attention(torch.nn.Module):
    """Attention to what comes before; sequences that are packed into one see nothing of each other."""

    def __init__(self, config: Any, *_: Any, **__: Any) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """Of [sequence, batch, heads, width], or [sequence, heads, width] where sequences are packed."""
        if packed_seq_params is None:
            places = [each.permute(1, 2, 0, 3) for each in (query, key, value)]
            attended = _attention(*places, mask=None if attention_mask is None else ~attention_mask)
            return attended.permute(2, 0, 1, 3).flatten(2)
        ends = packed_seq_params.cu_seqlens_q.tolist()
        parts = [
            _attention(*(each[begin:end].transpose(0, 1) for each in (query, key, value)), mask=None).transpose(0, 1)
            for begin, end in pairwise(ends)
            if end > begin
        ]
        return torch.cat(parts).flatten(1)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: torch.Tensor | None) -> Any:
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=True)

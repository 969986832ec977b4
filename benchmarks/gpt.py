"""A GPT in pipeline layers whose costs differ: embedding, `transformers`' GPT-2 blocks, and a head of its own."""

from __future__ import annotations

import torch
from deepspeed.pipe import LayerSpec
from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

__all__ = ["gpt_layers", "token_loss"]


class Embedding(nn.Module):
    """Token ids (b, s) to hidden states (b, s, width)."""

    def __init__(self, vocabulary: int, tokens: int, width: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(tokens, width))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids) + self.places


class Head(nn.Sequential):
    """Hidden states (b, s, width) to logits (b, s, vocabulary)."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False))


def gpt_layers(*, vocabulary: int, tokens: int, width: int, heads: int, blocks: int) -> list[LayerSpec]:
    """The layers of the model, each built where it is needed."""
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(n_positions=tokens, n_embd=width, n_head=heads, n_layer=blocks, use_cache=False, **dropout)
    config._attn_implementation = "sdpa"  # which is causal without a mask
    inner = [LayerSpec(GPT2Block, config, number) for number in range(blocks)]
    return [LayerSpec(Embedding, vocabulary, tokens, width), *inner, LayerSpec(Head, vocabulary, width)]


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits (b, s, vocabulary) against token ids (b, s)."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

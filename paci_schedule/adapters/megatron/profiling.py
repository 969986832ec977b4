"""What each layer of a GPTModel costs on this machine's device: embedding, blocks, and the head with the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from paci_schedule.errors import UnsupportedError
from paci_schedule.measure.profile import profile_layers
from paci_schedule.plan.layers import Layer

__all__ = ["layer_costs"]

_PARTS = "embedding", "decoder", "output_layer", "compute_language_model_loss"
_ROTARY = "rope", "yarn"
_POSITIONS = "learned_absolute", "none", *_ROTARY


def layer_costs(model: Any, micro_batch: tuple[torch.Tensor, torch.Tensor], **measuring: Any) -> list[Layer]:
    """The costs of the layers, with the roles that let `paci plan` print Megatron-LM's layout.

    Args:
        model: a GPTModel of megatron-core with embedding and output layer, on its device; gradients are added to it.
        micro_batch: tokens and labels, int64[samples, sequence].
        measuring: dtype and repeats of `measure.profile.profile_layers`.

    Raises:
        UnsupportedError: the model is no whole GPTModel, or has parts that are not measured.
        ConfigError: a layer fails on the micro-batch.
    """
    _check(model)
    device = next(model.parameters()).device
    tokens, labels = (each.to(device) for each in micro_batch)
    costs = profile_layers(_layers(model, tokens, labels), tokens, device, **measuring)
    roles = ["embedding", *["block"] * (len(costs) - 2), "head"]
    costs = [replace(cost, role=role) for cost, role in zip(costs, roles, strict=True)]
    if model.share_embeddings_and_output_weights:
        shared = model.shared_embedding_or_output_weight().numel()  # which another stage holds a copy of
        costs[0] = replace(costs[0], tied="embedding")
        costs[-1] = replace(costs[-1], tied="embedding", parameters=costs[-1].parameters + shared)
    return costs


def _check(model: Any) -> None:
    missing = [name for name in _PARTS if getattr(model, name, None) is None]
    if missing:
        raise UnsupportedError(
            f"a {type(model).__name__} without {', '.join(missing)} cannot be measured: give a whole GPTModel, built "
            "with pre_process=True and post_process=True, and not wrapped in DDP"
        )
    if model.config.mtp_num_layers:
        raise UnsupportedError(
            "layers that predict further tokens (mtp_num_layers) take the embedding besides the layer before, and a "
            "layer in the file has one input: measure the model without them, and leave the last stage room for as "
            "many blocks and heads"
        )
    if model.position_embedding_type not in _POSITIONS:
        raise UnsupportedError(
            f"position_embedding_type={model.position_embedding_type!r} cannot be measured: use one of "
            f"{', '.join(_POSITIONS)}"
        )


def _layers(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> Iterator[nn.Module]:
    rotary = None
    if model.position_embedding_type in _ROTARY and not model.config.multi_latent_attention:
        found = model.rotary_pos_emb(tokens.shape[1])
        rotary = found[0] if isinstance(found, tuple) else found  # YaRN's comes with its scale
    yield _Embedding(model, tokens)
    for block in model.decoder.layers:
        yield _Block(block, rotary)
    yield _Head(model, labels)


class _Embedding(nn.Module):
    def __init__(self, model: Any, tokens: torch.Tensor) -> None:
        super().__init__()
        self.embedding = model.embedding
        self._positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(input_ids=tokens, position_ids=self._positions)


class _Block(nn.Module):
    def __init__(self, block: nn.Module, rotary: torch.Tensor | None) -> None:
        super().__init__()
        self.block, self._rotary = block, rotary

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = self.block(hidden, attention_mask=None, rotary_pos_emb=self._rotary)
        return found[0] if isinstance(found, tuple) else found


class _Head(nn.Module):
    def __init__(self, model: Any, labels: torch.Tensor) -> None:
        super().__init__()
        self.norm, self.output = model.decoder.final_layernorm, model.output_layer
        self._loss, self._labels = model.compute_language_model_loss, labels
        tied = model.share_embeddings_and_output_weights
        self._weight = [model.shared_embedding_or_output_weight() if tied else None]  # in a list: it is no part of this

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden if self.norm is None else self.norm(hidden)
        logits, _ = self.output(hidden, weight=self._weight[0])
        return self._loss(self._labels, logits).float().mean()

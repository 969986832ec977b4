"""A decoder-only transformer, from a Hugging Face config: what its layers compute, move, and hold in memory.

A token takes 2 operations for each matrix parameter and 4 s h for its attention, where s is the sequence length and h
the width of all heads; the backward takes twice the forward.  Activations follow arXiv 2205.05198, section 4: of h
bytes a token, 2 each for what a norm, a matrix product or the attention reads, and 1 for the mask of a dropout.  The
s x s scores count only without a fused (flash) attention.  Tensor parallelism divides everything by its degree
(sequence parallelism is taken for granted), and adds two all-reduces to the forward of a block and two to its backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from paci_schedule.errors import ConfigError
from paci_schedule.plan.hardware import Device
from paci_schedule.plan.layers import Layer

__all__ = ["Transformer", "from_config"]

_MOST_LAYERS = 1000
_ID = 8  # bytes of a token's number
_MOVED = 280  # bytes a token and unit of width that a block's norms, activation functions and sums move, both ways
_MOVED_SCORES = 50  # bytes a token, head and position that an attention moves that is not fused, both ways
_MOVED_LOGITS = 12  # bytes a token and word that a loss moves, both ways

_KEYS = MappingProxyType(
    {  # what the planner needs -> the names that model families give it
        "layers": ("num_hidden_layers", "n_layer", "num_layers"),
        "hidden": ("hidden_size", "n_embd", "d_model"),
        "heads": ("num_attention_heads", "n_head", "num_heads"),
        "vocabulary": ("vocab_size",),
        "sequence": ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"),
    }
)
_EXPERTS = "num_experts", "num_local_experts", "n_routed_experts"


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """An embedding, equal blocks and a head."""

    layers: int
    """The number of blocks."""

    hidden: int
    heads: int
    key_value_heads: int
    """Fewer than `heads` where queries share keys and values (GQA)."""

    head_width: float
    inner: int
    """The width inside the MLP."""

    vocabulary: int
    sequence: int
    gated: bool
    """Whether the MLP has a third matrix, its gate (SwiGLU)."""

    biases: bool
    """Whether matrices and norms have biases."""

    dropout: bool
    """Whether the masks of dropouts are kept."""

    positions: int
    """Learned position embeddings; 0 where positions are rotary."""

    tied: bool
    """Whether the head shares the embedding's weight."""

    fused_attention: bool = True

    measured = False

    @property
    def count(self) -> int:
        """The number of layers, embedding and head among them."""
        return self.layers + 2

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.sequence

    @property
    def parameters(self) -> float:
        """The number of parameters; a tied weight counts once."""
        embedding, block, head = self._parameters()
        return embedding + self.layers * block + head - self.tied * self.vocabulary * self.hidden

    def check_tensor(self, slices: int) -> str:
        """Why tensor parallelism cannot make so many slices; "" where it can."""
        for name, value in (("heads", self.heads), ("key-value heads", self.key_value_heads), ("inner", self.inner)):
            if value % slices:
                return f"{slices} slices do not divide the {value} {name}"
        return ""

    def layers_on(self, device: Device, size: int, slices: int = 1) -> list[Layer]:
        """The layers for micro-batches of `size` sequences on such devices, each of which holds one of the slices.

        The device's links inside a node carry the all-reduces between slices.
        """
        tokens, hidden, words = size * self.sequence, self.hidden, self.vocabulary
        row = 2 * tokens * hidden / slices
        scores = 0 if self.fused_attention else self.heads * self.sequence
        width = self.heads * self.head_width
        embedding, block, head = (count / slices for count in self._parameters())
        work = tokens * (2 * self._matrices() + 4 * self.sequence * width) / slices
        moved = tokens * (_MOVED * hidden + _MOVED_SCORES * scores) / slices
        reduces = 2 * 2 * (slices - 1) / slices * 2 * tokens * hidden / device.inside.bandwidth if slices > 1 else 0.0
        head_work, head_moved = tokens * 2 * hidden * words / slices, tokens * _MOVED_LOGITS * words / slices
        shared = "embedding" if self.tied else None
        return [
            Layer(
                forward=0.0,
                backward=0.0,
                parameters=embedding,
                input_bytes=_ID * tokens,
                output_bytes=row,
                role="embedding",
                tied=shared,
                own_parameters=embedding - words * hidden / slices,
            ),
            *[
                Layer(
                    forward=device.seconds(work, tokens, moved / 3) + reduces,
                    backward=device.seconds(2 * work, tokens, moved * 2 / 3) + reduces,
                    parameters=block,
                    input_bytes=row,
                    saved_bytes=self._saved() * tokens / slices,
                    output_bytes=row,
                    role="block",
                )
            ]
            * self.layers,
            Layer(
                forward=device.seconds(head_work, tokens, head_moved / 3),
                backward=device.seconds(2 * head_work, tokens, head_moved * 2 / 3),
                parameters=head,
                input_bytes=row,
                saved_bytes=row + 4 * tokens * words / slices,
                workspace_bytes=6 * tokens * words / slices,
                role="head",
                tied=shared,
                own_parameters=head - words * hidden / slices,
            ),
        ]

    def _matrices(self) -> float:
        """The matrix parameters of a block."""
        attention = 2 * self.hidden * self.head_width * (self.heads + self.key_value_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.inner

    def _parameters(self) -> tuple[float, float, float]:
        """The parameters of the embedding, of a block and of the head."""
        norm = (2 if self.biases else 1) * self.hidden
        own = self.head_width * (self.heads + 2 * self.key_value_heads) + self.hidden + self.inner + self.hidden
        block = self._matrices() + 2 * norm + self.biases * own
        return (self.vocabulary + self.positions) * self.hidden, block, norm + self.hidden * self.vocabulary

    def _saved(self) -> float:
        """Bytes a token that a block keeps besides its input."""
        width, pairs = self.heads * self.head_width, 2 * self.key_value_heads * self.head_width
        attention = 2 * self.hidden + 2 * (width + pairs) + 2 * width
        mlp = 4 * self.hidden + (6 if self.gated else 4) * self.inner
        scores = 0 if self.fused_attention else (5 if self.dropout else 4) * self.heads * self.sequence
        return attention + mlp + 2 * self.hidden * self.dropout + scores


def from_config(config: dict[str, Any], sequence_length: int | None = None, tied: bool | None = None) -> Transformer:
    """The transformer with this Hugging Face config.

    Args:
        config: with GPT-2's names of the keys, or with those of newer models.
        sequence_length: tokens of a sequence; None takes the longest that the config allows.
        tied: whether the head shares the embedding's weight; None asks the config, and GPT-2's ties by default.

    Raises:
        ConfigError: a key is missing or its value cannot be, or the model is a mixture of experts.
    """
    found: dict[str, Any] = {}
    for need, names in _KEYS.items():
        values = [config[name] for name in names if isinstance(config.get(name), int)]
        if not values:
            raise ConfigError(f"model config without {' or '.join(names)}: the planner needs it; add it to the config")
        found[need] = values[0]
    for key in _EXPERTS:
        if (config.get(key) or 1) != 1:
            raise ConfigError(f"{key}={config[key]!r}: the planner knows dense models only; measure the layers")
    like_gpt2 = "n_embd" in config
    gated = (config.get("hidden_act") or config.get("hidden_activation")) in ("silu", "swish", "gelu_pytorch_tanh")
    given = {
        **found,
        "sequence": sequence_length or found["sequence"],
        "inner": config.get("intermediate_size") or config.get("n_inner") or 4 * found["hidden"],
        "key_value_heads": config.get("num_key_value_heads") or found["heads"],
        "head_width": config.get("head_dim") or (found["hidden"] / found["heads"] if found["heads"] else 0),
    }
    for name, value in given.items():
        if not isinstance(value, int | float) or not value >= 1:
            raise ConfigError(f"model config with {name}={value!r}: must be a number of at least 1")
    if found["layers"] > _MOST_LAYERS:
        raise ConfigError(f"model config with layers={found['layers']}: must be at most {_MOST_LAYERS}")
    return Transformer(
        **given,
        gated=gated,
        biases=not gated,
        dropout=bool(config.get("resid_pdrop", 0.1 if like_gpt2 else 0) or config.get("hidden_dropout", 0)),
        positions=found["sequence"] if like_gpt2 and "rotary_dim" not in config else 0,
        tied=bool(config.get("tie_word_embeddings", like_gpt2)) if tied is None else tied,
    )

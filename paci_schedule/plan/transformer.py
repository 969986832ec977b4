"""The model that the planner divides: a row of layers, from a Hugging Face config or from a file of measured layers.

From a config the figures are computed.  A token takes 2 operations for each matrix parameter and 4 s h for its
attention, where s is the sequence length and h the hidden size; the backward takes twice the forward.  Activations
follow arXiv 2205.05198, equation 2, without the s x s terms, which flash attention does not keep.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from paci_schedule.errors import ConfigError
from paci_schedule.plan.layers import Layer
from paci_schedule.simulate.costs import check_amount

__all__ = ["Model", "built_in", "from_config", "from_layers", "load_config"]


@dataclass(frozen=True)
class Model:
    """A row of layers; their figures are those of a micro-batch of one sequence.

    Attributes:
        layers: from the first to the last.
        sequence_length: tokens of a sequence.
        measured: True where the layers' times are seconds, False where they are floating-point operations.
    """

    layers: Sequence[Layer]
    sequence_length: int
    measured: bool

    @property
    def parameters(self) -> float:
        """The number of parameters of all layers."""
        return sum(layer.parameters for layer in self.layers)


_KEYS = MappingProxyType(
    {  # what the planner needs -> the names that model families give it
        "layers": ("num_hidden_layers", "n_layer", "num_layers"),
        "hidden": ("hidden_size", "n_embd", "d_model"),
        "heads": ("num_attention_heads", "n_head", "num_heads"),
        "vocabulary": ("vocab_size",),
        "sequence": ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"),
    }
)

_MEASURED = "forward", "backward", "parameters", "activation_bytes", "input_bytes"
_EXPERTS = "num_experts", "num_local_experts", "n_routed_experts"
_MOST_LAYERS = 1000
_ID = 8  # bytes of a token's number

_SIZES = MappingProxyType(
    {  # name -> layers, hidden, heads; GPT-2, and the models of arXiv 2401.10241, table 3
        "gpt2": (12, 768, 12),
        "gpt2-medium": (24, 1024, 16),
        "gpt2-large": (36, 1280, 20),
        "gpt2-xl": (48, 1600, 25),
        "gpt-1.5b": (22, 2304, 24),
        "gpt-6.2b": (30, 4096, 32),
        "gpt-14.6b": (46, 5120, 40),
        "gpt-28.3b": (62, 6144, 48),
    }
)


def built_in() -> tuple[str, ...]:
    """The names of the sizes that need no file."""
    return tuple(_SIZES)


def load_config(name: str) -> dict[str, Any] | None:
    """The config called `name`: a built-in size, a JSON file, or a folder with a config.json; None if there is none.

    Raises:
        ConfigError: the file cannot be read.
    """
    if name in _SIZES:
        layers, hidden, heads = _SIZES[name]
        return {"n_layer": layers, "n_embd": hidden, "n_head": heads, "vocab_size": 50257, "n_positions": 1024}
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    return _read_json("model", path) if path.exists() else None


def from_config(config: dict[str, Any], sequence_length: int | None = None) -> Model:
    """The layers of a transformer with this Hugging Face config: an embedding, blocks and an untied head.

    Args:
        config: with GPT-2's names of the keys, or with those of newer models.
        sequence_length: tokens of a sequence; None takes the longest that the config allows.

    Raises:
        ConfigError: a key is missing or its value cannot be, or the model is a mixture of experts.
    """
    found = {}
    for need, names in _KEYS.items():
        values = [config[name] for name in names if isinstance(config.get(name), int)]
        if not values:
            raise ConfigError(f"model config without {' or '.join(names)}: the planner needs it; add it to the config")
        found[need] = values[0]
    for key in _EXPERTS:
        if (config.get(key) or 1) != 1:
            raise ConfigError(f"{key}={config[key]!r}: the planner knows dense models only; measure the layers")
    hidden, vocabulary, sequence = found["hidden"], found["vocabulary"], sequence_length or found["sequence"]
    inner = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
    queries, keys = found["heads"], config.get("num_key_value_heads") or found["heads"]
    width = config.get("head_dim") or hidden / queries if queries else 0
    given = {**found, "inner": inner, "key-value heads": keys, "head width": width, "sequence": sequence}
    for name, value in given.items():
        if not isinstance(value, int | float) or not value >= 1:
            raise ConfigError(f"model config with {name}={value!r}: must be a number of at least 1")
    if found["layers"] > _MOST_LAYERS:
        raise ConfigError(f"model config with layers={found['layers']}: must be at most {_MOST_LAYERS}")
    gated = config.get("hidden_act") in ("silu", "swish")
    matrices = 2 * hidden * width * (queries + keys) + (3 if gated else 2) * hidden * inner
    row = 2 * sequence * hidden
    block_work = sequence * (2 * matrices + 4 * sequence * hidden)
    head_work = sequence * 2 * hidden * vocabulary
    block = Layer(
        forward=block_work,
        backward=2 * block_work,
        parameters=matrices + 4 * hidden,
        input_bytes=row,
        saved_bytes=sequence * (16 * hidden + 4 * inner),
        output_bytes=row,
        role="block",
    )
    embedding = Layer(
        forward=0.0,
        backward=0.0,
        parameters=hidden * vocabulary,
        input_bytes=_ID * sequence,
        output_bytes=row,
        role="embedding",
    )
    head = Layer(
        forward=head_work,
        backward=2 * head_work,
        parameters=hidden * vocabulary,
        input_bytes=row,
        saved_bytes=4 * sequence * vocabulary,
        role="head",
    )
    return Model([embedding, *[block] * found["layers"], head], sequence, measured=False)


def from_layers(path: Path) -> Model:
    """The layers that were measured, from a JSON file; times in seconds and bytes are those of one sequence.

    `{"sequence_length": 1024, "layers": [{"forward": 0.1, "backward": 0.2, "parameters": 1e7, "activation_bytes": 3e7,
    "input_bytes": 2e6, "count": 24}, ...]}`; "activation_bytes" is what a layer keeps from its forward to the end of
    its backward, its input included; "count" repeats a layer; "role" is "embedding", "block" or "head".  Both may be left
    out, but Megatron's flags are only known with the roles.  A layer hands on as much as the next one gets.

    Raises:
        ConfigError: the file cannot be read, a key is missing or not a number of at least 0, or nothing takes time.
    """
    content = _read_json("layers", path)
    layers: list[Layer] = []
    try:
        for number, entry in enumerate(content["layers"]):
            values = {key: float(entry[key]) for key in _MEASURED}
            for key, value in values.items():
                check_amount(f"{key} of layer {number}", value)
            layer = Layer(
                forward=values["forward"],
                backward=values["backward"],
                parameters=values["parameters"],
                input_bytes=values["input_bytes"],
                saved_bytes=max(0.0, values["activation_bytes"] - values["input_bytes"]),
                role=str(entry.get("role", "")),
            )
            layers += [layer] * min(int(entry.get("count", 1)), _MOST_LAYERS + 1)
        sequence = int(content["sequence_length"])
    except ConfigError as error:
        raise ConfigError(f"layers={str(path)!r}: {error}") from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"layers={str(path)!r}: {type(error).__name__} {error}; each layer needs {', '.join(_MEASURED)}, and the "
            "file a sequence_length"
        ) from None
    if not 1 <= len(layers) <= _MOST_LAYERS or sequence < 1:
        raise ConfigError(f"layers={str(path)!r}: needs 1 to {_MOST_LAYERS} layers and a sequence_length of at least 1")
    if not any(layer.forward + layer.backward for layer in layers):
        raise ConfigError(f"layers={str(path)!r}: no layer takes any time; write the measured seconds")
    handed_on = [layer.input_bytes for layer in layers[1:]] + [0.0]
    layers = [replace(layer, output_bytes=size) for layer, size in zip(layers, handed_on, strict=True)]
    return Model(layers, sequence, measured=True)


def _read_json(option: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}={str(path)!r}: cannot be read as JSON ({error}); name a JSON file") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{option}={str(path)!r}: must hold a JSON object, not a {type(content).__name__}")
    return content

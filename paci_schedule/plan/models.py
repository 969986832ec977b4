"""The models that the planner divides: layers of a config or of a measurement, and where they are read from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from paci_schedule.core.files import read_json
from paci_schedule.errors import ConfigError
from paci_schedule.plan.hardware import Device
from paci_schedule.plan.layers import Layer
from paci_schedule.simulate.costs import check_amount

__all__ = ["Measured", "Model", "built_in", "from_layers", "load_config", "write_layers"]


class Model(Protocol):
    """A row of layers, whose costs depend on the device, the micro-batch and the degree of tensor parallelism."""

    @property
    def measured(self) -> bool:
        """Whether the times were measured, so that `Device.flops` is a ratio of two devices."""
        ...

    @property
    def count(self) -> int:
        """The number of layers."""
        ...

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        ...

    @property
    def parameters(self) -> float:
        """The number of parameters; a tied weight counts once."""
        ...

    def check_tensor(self, slices: int) -> str:
        """Why tensor parallelism cannot make so many slices; "" where it can."""
        ...

    def layers_on(self, device: Device, size: int, slices: int = 1) -> list[Layer]:
        """The layers for micro-batches of `size` sequences on such devices."""
        ...


@dataclass(frozen=True)
class Measured:
    """Layers whose costs were measured.

    Attributes:
        layers: from the first to the last; times in seconds and bytes are those of `size` sequences.
        sequence_length: tokens of a sequence.
        size: the sequences of the micro-batch that was measured.
    """

    layers: Sequence[Layer]
    sequence_length: int
    size: int = 1
    measured = True

    @property
    def count(self) -> int:
        return len(self.layers)

    @property
    def parameters(self) -> float:
        shared = {
            layer.tied: layer.parameters - layer.own_parameters for layer in self.layers if layer.tied is not None
        }
        own = sum(layer.parameters if layer.tied is None else layer.own_parameters for layer in self.layers)
        return own + sum(shared.values())

    def check_tensor(self, slices: int) -> str:
        return "" if slices == 1 else "the layers were measured whole; measure slices of them"

    def layers_on(self, device: Device, size: int, slices: int = 1) -> list[Layer]:
        assert slices == 1, "refused by check_tensor"
        return [layer.scaled(size / self.size, 1 / device.flops) for layer in self.layers]


_MEASURED = "forward", "backward", "parameters", "activation_bytes", "input_bytes"
_FURTHER = "workspace_bytes", "frozen_bytes"
_MOST_LAYERS = 1000
_LARGEST = 1 << 24  # bytes of a file

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
    """The names of the sizes that need no file; their heads are not tied."""
    return tuple(_SIZES)


def load_config(name: str) -> dict[str, Any] | None:
    """The config called `name`: a built-in size, a JSON file, or a folder with a config.json; None if there is none.

    Raises:
        ConfigError: the file cannot be read.
    """
    if name in _SIZES:
        layers, hidden, heads = _SIZES[name]
        sizes = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "vocab_size": 50257, "n_positions": 1024}
        return {**sizes, "tie_word_embeddings": False}
    path = Path(name)
    try:
        path = path / "config.json" if path.is_dir() else path
        there = path.exists()
    except OSError:  # a name that is too long for a file
        return None
    return _read_json("model", path) if there else None


def from_layers(path: Path) -> Measured:
    """The layers that were measured, from a JSON file; times in seconds and bytes are those of one micro-batch.

    `{"sequence_length": 1024, "micro_batch_size": 1, "layers": [{"forward": 0.1, "backward": 0.2, "parameters": 1e7,
    "activation_bytes": 3e7, "input_bytes": 2e6, "count": 24}, ...]}`; "activation_bytes" is what a layer keeps from its
    forward to the end of its backward, its input included.  These may be left out: "micro_batch_size" (1), "count",
    which repeats a layer, "workspace_bytes" and "frozen_bytes" (0), "tied", the key of a shared weight, and "role",
    which is "embedding", "block" or "head"; Megatron's flags are only known with the roles.  A layer hands on as much
    as the next one gets.

    Raises:
        ConfigError: the file cannot be read, a key is missing or not a number of at least 0, or nothing takes time.
    """
    content = _read_json("layers", path)
    layers: list[Layer] = []
    try:
        for number, entry in enumerate(content["layers"]):
            values = {key: float(entry[key]) for key in _MEASURED}
            values |= {key: float(entry.get(key, 0)) for key in _FURTHER}
            for key, value in values.items():
                check_amount(f"{key} of layer {number}", value)
            kept = values.pop("activation_bytes") - values["input_bytes"]
            layer = Layer(
                **values, saved_bytes=max(0.0, kept), role=str(entry.get("role", "")), tied=entry.get("tied") or None
            )
            layers += [layer] * min(int(entry.get("count", 1)), _MOST_LAYERS + 1)
        sequence, size = int(content["sequence_length"]), int(content.get("micro_batch_size", 1))
    except ConfigError as error:
        raise ConfigError(f"layers={str(path)!r}: {error}") from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"layers={str(path)!r}: {type(error).__name__} {error}; each layer needs {', '.join(_MEASURED)}, and the "
            "file a sequence_length"
        ) from None
    if not 1 <= len(layers) <= _MOST_LAYERS or sequence < 1 or size < 1:
        raise ConfigError(f"layers={str(path)!r}: needs 1 to {_MOST_LAYERS} layers and a sequence_length of at least 1")
    if not any(layer.forward + layer.backward for layer in layers):
        raise ConfigError(f"layers={str(path)!r}: no layer takes any time; write the measured seconds")
    handed_on = [layer.input_bytes for layer in layers[1:]] + [0.0]
    layers = [replace(layer, output_bytes=size) for layer, size in zip(layers, handed_on, strict=True)]
    return Measured(layers, sequence, size)


def write_layers(path: Path, layers: Sequence[Layer], sequence_length: int, micro_batch_size: int) -> None:
    """Write measured layers to a file that `from_layers` reads.

    Args:
        path: the file; its folder is created if it is missing.
        layers: their costs for one micro-batch.
        sequence_length: tokens of a sequence.
        micro_batch_size: sequences of the micro-batch.
    """
    entries = []
    for layer in layers:
        entry = {key: getattr(layer, key) for key in (*_MEASURED, *_FURTHER) if key != "activation_bytes"}
        entry["activation_bytes"] = layer.input_bytes + layer.saved_bytes
        entry |= {key: getattr(layer, key) for key in ("tied", "role") if getattr(layer, key)}
        entries.append(entry)
    content = {"sequence_length": sequence_length, "micro_batch_size": micro_batch_size, "layers": entries}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"output={str(path)!r}: cannot be written ({error}); name another file") from None


def _read_json(option: str, path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, _LARGEST)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}={str(path)!r}: cannot be read as JSON ({error}); name a JSON file") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{option}={str(path)!r}: must hold a JSON object, not a {type(content).__name__}")
    return content

"""A layer as the planner and the partition see it: what it computes, and what it holds in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from paci_schedule.errors import ConfigError

__all__ = ["Layer"]

ROLES = "embedding", "block", "head"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a model; its times and bytes are those of one micro-batch.

    Raises:
        ConfigError: a number is negative or not finite, or the role is unknown.
    """

    forward: float
    """Seconds of the forward."""

    backward: float
    """Seconds of the whole backward."""

    input_bytes: float = 0
    """What the layer gets from the layer before; it is kept until the backward."""

    saved_bytes: float = 0
    """What the layer keeps for its backward besides its input and its output."""

    workspace_bytes: float = 0
    """What the layer takes besides, while its forward or backward runs."""

    output_bytes: float = 0
    """What the layer hands on; it counts where a stage ends, because within a stage it is the next layer's input."""

    parameters: float = 0
    """The number of trained parameters; how many bytes each of them takes depends on the job."""

    frozen_bytes: float = 0
    """Parameters that are not trained, and buffers."""

    tied: str | None = None
    """The key of a layer that shares its parameters with others; a stage holds them once for each key."""

    own_parameters: float = 0
    """Those of `parameters` that it does not share."""

    role: str = ""
    """What the layer is in a transformer: one of `ROLES`, or "" where that is not known."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("tied", "role") and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{field.name}={value!r}: a layer's cost must be finite and at least 0")
        if self.role not in ("", *ROLES):
            raise ConfigError(f"role={self.role!r}: must be one of {', '.join(ROLES)}, or left out")

    def scaled(self, size: float, seconds: float) -> Layer:
        """The same layer for a micro-batch `size` times as large, with `seconds` in place of every unit of time."""
        return replace(
            self,
            forward=self.forward * size * seconds,
            backward=self.backward * size * seconds,
            input_bytes=self.input_bytes * size,
            saved_bytes=self.saved_bytes * size,
            workspace_bytes=self.workspace_bytes * size,
            output_bytes=self.output_bytes * size,
        )

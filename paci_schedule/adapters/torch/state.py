"""A stage's deferred state as tensors of shapes that only the job decides, so that it is saved and loaded in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from paci_schedule.adapters.torch.ties import Ties

__all__ = ["as_tensors", "from_tensors"]


def as_tensors(state: Mapping[str, Any], ties: Ties, stages: int) -> dict[str, Any]:
    """As of `DeferredState.state`, each list of sums filled up with zeros to the number that may wait."""
    tied: dict[str, Any] = {}
    for name, gradient in ties.gradients.items():
        sums, nothing = state["tied"][name], torch.zeros_like(ties.weights[name])
        padded = [*sums, *[nothing] * (gradient.delay - len(sums))]
        tied[name] = {"pending": torch.tensor(len(sums)), "sums": torch.stack(padded).detach()}
    return {
        "norms": torch.tensor(state["norms"]).reshape(-1, stages),
        "factor": torch.tensor(float("nan") if state["factor"] is None else state["factor"]),
        "tied": tied,
    }


def from_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What `DeferredState.load_state` takes."""
    factor = tensors["factor"].item()
    return {
        "norms": tensors["norms"].tolist(),
        "factor": None if factor != factor else factor,
        "tied": {
            name: list(tied["sums"].clone().unbind())[: int(tied["pending"])] for name, tied in tensors["tied"].items()
        },
    }

"""A stage's deferred state as tensors of shapes that only the job decides, so that it is saved and loaded in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from paci_schedule.adapters.torch.ties import Ties
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.runtime.spikes import NOTHING_JUDGED, WINDOW, judging_delay

__all__ = ["as_tensors", "from_tensors"]


def as_tensors(state: Mapping[str, Any], ties: Ties, spec: PipelineSpec) -> dict[str, Any]:
    """As of `DeferredState.state`, each list filled up to the length that it has at most: sums with zeros, losses with
    NaN."""
    tied: dict[str, Any] = {}
    for name, gradient in ties.gradients.items():
        sums, nothing = state["tied"][name], torch.zeros_like(ties.weights[name])
        padded = [*sums, *[nothing] * (gradient.delay - len(sums))]
        tied[name] = {"pending": torch.tensor(len(sums)), "sums": torch.stack(padded).detach()}
    spikes = state["spikes"] or NOTHING_JUDGED
    return {
        "spikes": {
            "left": torch.tensor(spikes["left"]),
            "before": _padded(spikes["before"], WINDOW),
            "open": _padded([loss for (loss,) in spikes["open"]], 1 + judging_delay(spec)),
        },
        "norms": torch.tensor(state["norms"]).reshape(-1, spec.stages),
        "factor": torch.tensor(float("nan") if state["factor"] is None else state["factor"]),
        "tied": tied,
    }


def from_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What `DeferredState.load_state` takes."""
    factor, spikes = tensors["factor"].item(), tensors["spikes"]
    return {
        "spikes": {
            "left": int(spikes["left"]),
            "before": _told(spikes["before"]),
            "open": [[loss] for loss in _told(spikes["open"])],
        },
        "norms": tensors["norms"].tolist(),
        "factor": None if factor != factor else factor,
        "tied": {
            name: list(tied["sums"].clone().unbind())[: int(tied["pending"])] for name, tied in tensors["tied"].items()
        },
    }


def _padded(losses: list[float], length: int) -> torch.Tensor:
    return torch.tensor([*losses, *[float("nan")] * (length - len(losses))], dtype=torch.float64)


def _told(padded: torch.Tensor) -> list[float]:
    return padded[~padded.isnan()].tolist()

"""A training run of the small GPT on a text, under one schedule and one prediction."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError, nearest
from paci_schedule.rehearse import gpt
from paci_schedule.rehearse.masters import with_masters
from paci_schedule.rehearse.run import REHEARSABLE, rehearse
from paci_schedule.rehearse.text import Text
from paci_schedule.rehearse.variant import Variant

__all__ = ["Settings", "Trial", "run"]

_OPTIMIZERS = ("adamw", "nadam", "muon")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_VALIDATION_WINDOWS, _VALIDATION_BATCH = 400, 50
_FLOOR = 0.1  # share of the highest learning rate that is left in the end
_BETAS, _DECAY, _CLIP, _MUON_RATE = (0.9, 0.95), 0.1, 1.0, 5.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that all trials of a comparison have in common."""

    stages: int
    accumulation: int
    layers: int
    width: int
    context: int
    micro_batch: int
    updates: int
    """The number of updates of the last stage; each takes a micro-batches."""
    lr: float
    """The highest learning rate; Muon's matrices take 5 times as much."""
    warm_up: int
    """Micro-batches until that rate is reached."""
    optimizer: str
    dtype: str
    """The type of the weights and activations: "fp32", or "bf16" with masters and sums of gradients in fp32."""
    seed: int
    device: str

    @property
    def spec(self) -> PipelineSpec:
        """The pipeline."""
        return PipelineSpec(stages=self.stages, accumulation=self.accumulation)

    def __post_init__(self) -> None:
        for name in ("context", "micro_batch", "updates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be a whole number of at least 1")
        if self.warm_up < 0:
            raise ConfigError(f"warm_up={self.warm_up}: must be a whole number of micro-batches, at least 0")
        if not self.lr > 0:
            raise ConfigError(f"lr={self.lr}: must be more than 0")
        if self.optimizer not in _OPTIMIZERS:
            raise ConfigError(f"optimizer={self.optimizer!r}: must be one of {nearest(self.optimizer, _OPTIMIZERS)}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype={self.dtype!r}: must be one of {nearest(self.dtype, _DTYPES)}")
        if self.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
            raise ConfigError(
                f"optimizer='muon': torch {torch.__version__} has none; take torch 2.9 or later, or adamw"
            )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The results of a run.

    Attributes:
        variant: its schedule and prediction.
        updates: the number of batches that it trained on, with a micro-batches each.
        validation: the mean loss of a token of the validation text, in nats.
        drift: the largest drift of each stage.
        seconds: the time that the run took in this process.
        losses: the mean training loss of each batch.
    """

    variant: Variant
    updates: int
    validation: float
    drift: list[int]
    seconds: float
    losses: list[float]

    def facts(self) -> dict[str, Any]:
        """All results, for JSON."""
        found = asdict(self)
        return {**found.pop("variant"), **found}


def run(settings: Settings, text: Text, variant: Variant, updates: int, tick: Callable[[], None]) -> Trial:
    """Train a fresh model, and validate it.

    Args:
        settings: the settings of the model, the data and the optimizer.
        text: the text to train on.
        variant: the schedule and the prediction.
        updates: the number of batches; the learning rate decays over all of them.
        tick: a function that is called once for every batch.

    Raises:
        ConfigError: a setting is out of its range.
        UnsupportedError: the options cannot be combined.
    """
    started = time.perf_counter()
    stages = gpt.stages(
        settings.stages, settings.layers, settings.width, settings.context, text.vocabulary, settings.seed
    )
    stages = [stage.to(settings.device, _DTYPES[settings.dtype]) for stage in stages]
    optimizers = [_optimizers(settings, stage) for stage in stages]
    spec = settings.spec
    per_batch = spec.accumulation // REHEARSABLE[variant.schedule].schedule.micro_batches_per_update(spec)
    share = _share(updates * per_batch, settings.warm_up * per_batch // settings.accumulation)
    schedulers = [[torch.optim.lr_scheduler.LambdaLR(each, share) for each in several] for several in optimizers]
    losses, drift = [], [0] * settings.stages

    def batches() -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        for number in range(updates):
            first = number * settings.accumulation
            indices = range(first, first + settings.accumulation)
            yield [text.micro_batch(settings.seed, index, settings.micro_batch) for index in indices]
            tick()

    training = rehearse(
        stages,
        optimizers,
        _loss,
        batches(),
        accumulation=settings.accumulation,
        **asdict(variant),
        clip=_CLIP,
        schedulers=schedulers,
    )
    for update in training:
        losses.append(update.loss)
        drift = update.drift
    means = [sum(losses[at : at + per_batch]) / per_batch for at in range(0, len(losses), per_batch)]
    return Trial(
        variant=variant,
        updates=updates,
        validation=_validate(stages, text),
        drift=drift,
        seconds=time.perf_counter() - started,
        losses=means,
    )


def _optimizers(settings: Settings, stage: nn.Sequential) -> list[Optimizer]:
    others, rest = list(stage.parameters()), {"betas": _BETAS, "weight_decay": _DECAY}
    kept: Callable[[type[Any]], type[Any]] = (lambda base: base) if settings.dtype == "fp32" else with_masters
    if settings.optimizer == "nadam":
        return [kept(torch.optim.NAdam)(others, lr=settings.lr, decoupled_weight_decay=True, **rest)]
    if settings.optimizer == "adamw":
        return [kept(torch.optim.AdamW)(others, lr=settings.lr, **rest)]
    matrices = gpt.hidden_matrices(stage)
    others = [parameter for parameter in others if all(parameter is not matrix for matrix in matrices)]
    return [
        kept(torch.optim.Muon)(matrices, lr=_MUON_RATE * settings.lr, weight_decay=_DECAY),
        kept(torch.optim.AdamW)(others, lr=settings.lr, **rest),
    ]


def _share(updates: int, warm_up: int) -> Callable[[int], float]:
    """The share of the highest learning rate at an update: it rises linearly, then falls like a cosine."""

    def share(update: int) -> float:
        if update < warm_up:
            return (update + 1) / warm_up
        done = min(1.0, (update - warm_up) / max(1, updates - warm_up))
        return _FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * done)) / 2

    return share


def _loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1).float(), labels.flatten())


@torch.no_grad()
def _validate(stages: Sequence[nn.Module], text: Text) -> float:
    inputs, labels = text.validation(_VALIDATION_WINDOWS)
    total = 0.0
    for x, y in zip(inputs.split(_VALIDATION_BATCH), labels.split(_VALIDATION_BATCH), strict=True):
        for stage in stages:
            x = stage(x)
        total += _loss(x, y).item() * len(y)
    return total / len(labels)

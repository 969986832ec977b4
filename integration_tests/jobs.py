"""What a training job is: model, data, optimizer and a script of calls, the same for the reference and an engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["EVALUATION_DATA", "LAYERS", "Job", "data", "layers", "loss", "optimizer", "parameter_groups", "schedule"]

LAYERS = 12  # of every model: a cut into 1, 2, 3, 4 or 6 stages of equally many layers, all of unequal size
EVALUATION_DATA = 10_000  # index of the first micro-batch used for evaluations
_WORDS, _LENGTH, _SAMPLES = 13, 5, 3  # vocabulary, sequence length, samples in a micro-batch
_WIDTHS = (7, 8, 11, 6, 9, 10, 5, 12, 8, 7, 9, 6, 8)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job.

    Attributes:
        stages: P.
        accumulation: a, at the start.
        script: what the training loop calls, in order: "train", "drain", "eval", "save", "accumulate=N" (N micro-
            batches an update from here on, by set_train_batch_size); "train x3" is three of them.
        model: "words" (one tensor between stages), "pairs" (a tuple of two floating tensors and one of integers
            between stages, tuples as inputs and labels), "hollow" (like "words", the middle third without
            parameters), "frozen" (like "words", only the last third trained) or "matrices" (like "words", only matrices
            trained).
        precision: "fp32", "bf16" (fp32 gradient accumulation, ZeRO stage 1) or "bf16-bf16" (bf16 accumulation,
            stage 0).
        optimizer: "adamw", "adam", "nadam", "sgd", "muon", or "groups" (AdamW with a group that decays and one that
            does not).
        clip: largest gradient norm of a stage; 0 clips nothing.
        warmup: whether the learning rate changes from update to update.
        config: more keys for the DeepSpeed config.
        first_micro_batch: index of the first micro-batch to train on.
        extra_in_flight: k.
    """

    stages: int
    accumulation: int
    script: tuple[str, ...]
    model: str = "words"
    precision: str = "fp32"
    optimizer: str = "adamw"
    clip: float = 0.0
    warmup: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    first_micro_batch: int = 0
    extra_in_flight: int = 0

    def actions(self) -> Iterator[str]:
        """The script, "train xN" written out."""
        for action in self.script:
            name, _, times = action.partition(" x")
            yield from [name] * int(times or 1)

    def stage_layers(self, stage: int) -> range:
        """The layers of a stage."""
        each = LAYERS // self.stages
        return range(stage * each, (stage + 1) * each)


# ---- models: every layer is seeded by its number, so that any process builds the same --------------------------------


def _fit(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """x with zeros behind, or without its last features, as wide as what `linear` puts out."""
    return torch.nn.functional.pad(x, (0, linear.out_features - linear.in_features))


class _Embed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, width)
        self.places = nn.Parameter(0.3 * torch.randn(_LENGTH, width))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids) + self.places


class _Mix(nn.Module):
    """Attention over the sequence, added to what comes in, which is padded or cropped to the new width."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query_key = nn.Linear(width, 2 * width)
        self.value = nn.Linear(width, wide, bias=False)
        self.scale = nn.Parameter(torch.rand(wide) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = self.query_key(self.norm(x)).chunk(2, dim=-1)
        weight = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        return _fit(x, self.value) + torch.tanh(weight @ self.value(x)) * self.scale


class _Squeeze(nn.Module):
    """A layer without parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * 0.9


class _PairEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.left = nn.Linear(3, width)
        self.right = nn.Embedding(_WORDS, width)

    def forward(self, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        numbers, ids = batch
        return self.left(numbers.to(self.left.weight.dtype)), self.right(ids), ids


class _PairMix(nn.Module):
    """Two streams side by side; no parameter takes part in both, so that the order of their backwards adds nothing."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.left = nn.Linear(width, wide)
        self.right = nn.Linear(width, wide, bias=False)

    def forward(self, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        left, right, ids = batch
        return (
            _fit(left, self.left) + torch.tanh(self.left(left)),
            _fit(right, self.right) + torch.sin(self.right(right)),
            ids,
        )


class _PairHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, _WORDS)

    def forward(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        left, right, ids = batch
        return self.out(left * right) + 0.1 * torch.nn.functional.one_hot(ids, _WORDS).to(left.dtype)


def layers(model: str) -> list[nn.Module]:
    """The layers of a model, freshly built; the same numbers in every process."""
    middle = range(LAYERS // 3, 2 * LAYERS // 3)
    widths = list(_WIDTHS)
    if model == "hollow":
        widths[middle.start : middle.stop + 1] = [_WIDTHS[middle.start]] * (len(middle) + 1)
    embed, mix, head = (_PairEmbed, _PairMix, _PairHead) if model == "pairs" else (_Embed, _Mix, nn.Linear)
    built = []
    with torch.random.fork_rng(devices=[]):
        for number in range(LAYERS):
            torch.manual_seed(400 + number)
            if number == 0:
                built.append(embed(widths[1]))
            elif number == LAYERS - 1:
                built.append(head(widths[number]) if model == "pairs" else head(widths[number], _WORDS))
            elif model == "hollow" and number in middle:
                built.append(_Squeeze())
            else:
                built.append(mix(widths[number], widths[number + 1]))
            built[-1].requires_grad_(model != "frozen" or number >= middle.stop)
            if model == "matrices":
                for parameter in built[-1].parameters():
                    parameter.requires_grad_(parameter.ndim == 2)
    return built


def loss(output: torch.Tensor, labels: Any) -> torch.Tensor:
    """Cross entropy of one micro-batch in fp32, a scalar; weighted by sample where the labels say so."""
    if isinstance(labels, tuple):
        target, weight = labels
        each = torch.nn.functional.cross_entropy(output.float().flatten(0, 1), target.flatten(), reduction="none")
        return (each.view_as(target) * weight[:, None]).mean()
    return torch.nn.functional.cross_entropy(output.float().flatten(0, 1), labels.flatten())


def micro_batch(model: str, index: int) -> tuple[Any, Any]:
    """Inputs and labels of one micro-batch."""
    generator = torch.Generator().manual_seed(90_000 + index)
    ids = torch.randint(_WORDS, (_SAMPLES, _LENGTH), generator=generator)
    labels = (ids * 3 + ids.roll(1, dims=1)) % _WORDS
    if model != "pairs":
        return ids, labels
    numbers = torch.randn(_SAMPLES, _LENGTH, 3, generator=generator)
    return (numbers, ids), (labels, torch.rand(_SAMPLES, generator=generator) + 0.5)


def data(model: str, first: int = 0) -> Iterator[tuple[Any, Any]]:
    """Micro-batches without end, from index `first` on."""
    index = first
    while True:
        yield micro_batch(model, index)
        index += 1


# ---- optimizers and schedules: factories, because every stage has its own --------------------------------------------


def parameter_groups(job: Job, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """The parameter groups that the optimizer gets, for one stage."""
    if job.optimizer != "groups":
        return [{"params": parameters}]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def optimizer(job: Job) -> Callable[[Any], torch.optim.Optimizer]:
    """What builds a stage's optimizer from parameters or parameter groups."""
    kinds = {
        "adamw": functools.partial(torch.optim.AdamW, lr=0.02, betas=(0.8, 0.95), weight_decay=0.03),
        "groups": functools.partial(torch.optim.AdamW, lr=0.02),
        "adam": functools.partial(torch.optim.Adam, lr=0.02),
        "nadam": functools.partial(torch.optim.NAdam, lr=0.02, weight_decay=0.03, decoupled_weight_decay=True),
        "sgd": functools.partial(torch.optim.SGD, lr=0.3, momentum=0.6),
    }
    if hasattr(torch.optim, "Muon"):  # since torch 2.9
        kinds["muon"] = functools.partial(torch.optim.Muon, lr=0.05)
    return kinds[job.optimizer]


def _rate(update: int) -> float:
    return min(1.0, (update + 1) / 4) / (1.0 + 0.05 * update)


def schedule(job: Job) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None:
    """What builds a stage's learning-rate schedule, if it has one: up for four updates, then down."""
    return functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=_rate) if job.warmup else None

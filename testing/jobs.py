"""What a training job is: model, data, optimizer and a script of calls, the same for the reference and an engine."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = [
    "EVALUATION_DATA",
    "LAYERS",
    "TIED",
    "TIES",
    "Job",
    "Shared",
    "data",
    "layers",
    "loss",
    "micro_batch",
    "optimizer",
    "parameter_groups",
    "poison",
    "schedule",
]

LAYERS = 12  # of every model: it can be split into 1, 2, 3, 4 or 6 stages of equally many layers, all of unequal size
EVALUATION_DATA = 10_000  # index of the first micro-batch used for evaluations
_WORDS, _LENGTH, _SAMPLES = 13, 5, 3  # vocabulary, sequence length, samples in a micro-batch
_WIDTHS = (7, 8, 11, 6, 9, 10, 5, 12, 8, 7, 9, 6, 8)


APART = 1_000  # micro-batches between the data of one replica and the next

TIED = {"words": (0, LAYERS - 1), "square": (3, 8)}
"""Key -> the layers that share a weight, in the model "tied"."""

_THRICE = {"square": (1, 6, LAYERS - 2)}

TIES = {"tied": TIED, "copies": TIED, "thrice": _THRICE, "still": TIED, "deaf": _THRICE}
"""The same for every model that has such layers."""

_FROZEN, _DETACHED = {"still": "words"}, {"deaf": 6}  # model -> the key of a frozen weight, a layer without gradient
_TIED_WIDTH = 8


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job.

    Attributes:
        stages: P.
        accumulation: a, at the start.
        script: what the training loop calls, in order: "train", "drain", "drained" (look at the module after a drain),
            "eval", "save", "load" (what was saved last), "accumulate=N" (N micro-batches an update from here on, by
            set_train_batch_size), "samples=N" (in a micro-batch, by set_train_micro_batch_size; the data stays as it
            is), "schedule=NAME", "rate=X" (the learning rate, until a schedule changes it), "reset" (of the
            activations' shape); "train x3" is three of them.
        model: "words" (one tensor between stages), "pairs" (a tuple of two floating tensors and one of integers
            between stages, tuples as inputs and labels), "hollow" (like "words", the middle third without
            parameters), "frozen" (like "words", only the last third trained), "matrices" (like "words", only matrices
            trained), "sparse" (like "words", the embedding's gradient is a sparse tensor); with shared weights: "tied"
            (the embedding is the output layer as well, and layer 3 shares its matrix with layer 8), "copies" (like
            "tied", but the last third has no weights of its own), "thrice" (three layers share a matrix), "still"
            (like "tied" with a frozen embedding) and "deaf" (like "thrice", but the second of the three layers gets no
            gradient); "lora" (like "words", everything frozen but adapters beside the linear layers of the first two
            thirds).
        precision: "fp32", "bf16" (fp32 gradient accumulation, ZeRO stage 1) or "bf16-bf16" (bf16 accumulation,
            stage 0).
        optimizer: "adamw", "adam", "nadam", "sgd", "muon", "fused" (AdamW in one kernel), "groups" (AdamW with a group
            that decays and one that does not), or what builds one from parameter groups.
        clip: largest gradient norm; 0 clips nothing.
        warmup: whether the learning rate changes from update to update.
        config: more keys for the DeepSpeed config.
        first_micro_batch: index of the first micro-batch to train on.
        poison: (stage, micro-batch, parameter): the gradient of that micro-batch, counted from 0 where training starts,
            has an infinite element, in that parameter of that stage, by number; None for no such gradient.
        marked: every parameter is marked `model_parallel`, as if it were a slice.
        shapes: samples and length of the micro-batches to train on, over and over again; empty where all are whole.
    """

    stages: int
    accumulation: int
    script: tuple[str, ...]
    model: str = "words"
    precision: str = "fp32"
    optimizer: str | Callable[[Any], torch.optim.Optimizer] = "adamw"
    clip: float = 0.0
    warmup: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    first_micro_batch: int = 0
    poison: tuple[int, int, int] | None = None
    marked: bool = False
    shapes: tuple[tuple[int, int], ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The block "paci" of the DeepSpeed config."""
        return self.config.get("paci", {})

    def actions(self) -> Iterator[str]:
        """The script, "train xN" written out."""
        for action in self.script:
            name, _, times = action.partition(" x")
            yield from [name] * int(times or 1)

    def stage_layers(self, stage: int) -> range:
        """The layers of a stage."""
        each = LAYERS // self.stages
        return range(stage * each, (stage + 1) * each)

    def holders(self, key: str) -> tuple[int, ...]:
        """The stage of each layer that shares a weight."""
        return tuple(layer // (LAYERS // self.stages) for layer in TIES[self.model][key])

    def of_replica(self, replica: int) -> Job:
        """The job as one data-parallel replica does it: with data of its own."""
        return dataclasses.replace(self, first_micro_batch=self.first_micro_batch + replica * APART)


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
        return self.words(ids) + self.places[: ids.shape[-1]]


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


class _Adapted(nn.Module):
    """A frozen linear layer and, beside it, two thin matrices that are trained, as peft builds them for LoRA."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * 4.0


def _adapt(module: nn.Module) -> None:
    """Freeze the module, and put adapters beside its linear layers."""
    module.requires_grad_(False)
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, _Adapted(child))


def _Head(width: int) -> nn.Linear:
    return nn.Linear(width, _WORDS)


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


class Shared(nn.Module):
    """A layer with a shared weight: the embedding and the head, or square layers in the middle.

    Args:
        key: "words" or "square".
        frozen: the weight is not trained.
        detached: the weight gets no gradient here, and changes as the others do.
    """

    def __init__(self, key: str, frozen: bool = False, detached: bool = False) -> None:
        super().__init__()
        self.key, self._detached = key, detached
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(500 + len(key))
            weight = 0.4 * torch.randn(_WORDS if key == "words" else _TIED_WIDTH, _TIED_WIDTH)
        self.weight = nn.Parameter(weight, requires_grad=not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.detach() if self._detached else self.weight
        if self.key == "square":
            return x + torch.tanh(torch.nn.functional.linear(x, weight))
        look_up = not x.is_floating_point()
        return torch.nn.functional.embedding(x, weight) if look_up else torch.nn.functional.linear(x, weight)


def layers(model: str, shared: Callable[[str, bool, bool], Any] = Shared) -> list[Any]:
    """The layers of a model, freshly built; the same numbers in every process.

    Args:
        model: as `Job.model`.
        shared: what makes a layer with a shared weight from the arguments of `Shared`.
    """
    middle = range(LAYERS // 3, 2 * LAYERS // 3)
    widths = list(_WIDTHS) if model not in TIES else [_TIED_WIDTH] * len(_WIDTHS)
    if model == "hollow":
        widths[middle.start : middle.stop + 1] = [_WIDTHS[middle.start]] * (len(middle) + 1)
    keys = {number: key for key, numbers in TIES.get(model, {}).items() for number in numbers}
    embed, mix, head = (_PairEmbed, _PairMix, _PairHead) if model == "pairs" else (_Embed, _Mix, _Head)
    built: list[Any] = []
    with torch.random.fork_rng(devices=[]):
        for number in range(LAYERS):
            torch.manual_seed(400 + number)
            if number in keys:
                key = keys[number]
                built.append(shared(key, _FROZEN.get(model) == key, _DETACHED.get(model) == number))
                continue
            if number == 0:
                built.append(embed(widths[1]))
            elif model == "copies" and number >= middle.stop:
                built.append(_Squeeze())
            elif number == LAYERS - 1:
                built.append(head(widths[number]))
            elif model == "hollow" and number in middle:
                built.append(_Squeeze())
            else:
                built.append(mix(widths[number], widths[number + 1]))
            built[-1].requires_grad_(model != "frozen" or number >= middle.stop)
            if model == "lora":
                _adapt(built[-1]) if number < middle.stop else built[-1].requires_grad_(False)
            if model == "matrices":
                for parameter in built[-1].parameters():
                    parameter.requires_grad_(parameter.ndim == 2)
    if model == "sparse":
        built[0].words.sparse = True
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


def data(model: str, first: int = 0, shapes: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Micro-batches without end, from index `first` on; `shapes` as of `Job`, from index 0 on."""
    for index in itertools.count(first):
        whole = micro_batch(model, index)
        yield _cropped(whole, *shapes[index % len(shapes)]) if shapes else whole


def _cropped(tensors: Any, samples: int, length: int) -> Any:
    if isinstance(tensors, tuple):
        return tuple(_cropped(each, samples, length) for each in tensors)
    return tensors[:samples, :length] if tensors.ndim > 1 else tensors[:samples]


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
    if callable(job.optimizer):
        return job.optimizer
    kinds = {
        "adamw": functools.partial(torch.optim.AdamW, lr=0.02, betas=(0.8, 0.95), weight_decay=0.03),
        "groups": functools.partial(torch.optim.AdamW, lr=0.02),
        "adam": functools.partial(torch.optim.Adam, lr=0.02),
        "nadam": functools.partial(torch.optim.NAdam, lr=0.02, weight_decay=0.03, decoupled_weight_decay=True),
        "fused": functools.partial(torch.optim.AdamW, lr=0.02, fused=True),
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


def poison(job: Job, stage: int, parameters: list[nn.Parameter]) -> None:
    """Spoil the gradient that `Job.poison` names, where it is of this stage; `parameters` are all of the stage."""
    if job.poison is None or job.poison[0] != stage:
        return
    _, micro_batch, number = job.poison
    seen = itertools.count()

    def spoiled(gradient: torch.Tensor) -> torch.Tensor:
        if next(seen) == micro_batch:
            gradient = gradient.clone()
            gradient.view(-1)[1] = torch.inf
        return gradient

    parameters[number].register_hook(spoiled)

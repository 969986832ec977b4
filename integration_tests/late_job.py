"""Jobs of what comes late by design: carried norms, tied weights, schedules that change on the way.

The models and scripts of `jobs`, and beyond: the model "tied", whose embedding is its output layer as well and whose
layer 3 shares its matrix with layer 8, the model "copies", like "tied" but for a last third without weights of its
own, the model "thrice", three of whose layers share a matrix, the model "still", like "tied" with a frozen embedding,
the model "deaf", like "thrice" but for the second of the three, which gets no gradient, and the action "schedule=NAME".
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from integration_tests import deepspeed_job, jobs, ranks
from integration_tests.jobs import LAYERS, Job

__all__ = ["TIED", "TIES", "Runs", "Shared", "build", "in_place_of_jobs", "layers", "options", "poison", "run", "train"]

TIED = {"words": (0, LAYERS - 1), "square": (3, 8)}
"""Key -> the layers that share a weight, in the model "tied"."""

THRICE = {"square": (1, 6, LAYERS - 2)}

TIES = {"tied": TIED, "copies": TIED, "thrice": THRICE, "still": TIED, "deaf": THRICE}
"""By model; the others have none."""

_FROZEN, _DETACHED = {"still": "words"}, {"deaf": 6}  # by model: the key of a frozen weight, a layer without gradient

_WIDTH, _WORDS = 8, 13


class Shared(nn.Module):
    """A layer with a shared weight: of the embedding and the head, or of square layers in the middle.

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
            weight = 0.4 * torch.randn(_WORDS if key == "words" else _WIDTH, _WIDTH)
        self.weight = nn.Parameter(weight, requires_grad=not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.detach() if self._detached else self.weight
        if self.key == "square":
            return x + torch.tanh(torch.nn.functional.linear(x, weight))
        look_up = not x.is_floating_point()
        return torch.nn.functional.embedding(x, weight) if look_up else torch.nn.functional.linear(x, weight)


def layers(model: str, spec: Any = Shared) -> list[Any]:
    """As `jobs.layers`, of the models in `TIES` too; `spec(key, frozen, detached)` makes a `Shared` layer."""
    if model not in TIES:
        return _LAYERS_OF_JOBS(model)
    key_of = {number: key for key, numbers in TIES[model].items() for number in numbers}
    ends = {0: jobs._Embed, LAYERS - 1: lambda width: nn.Linear(width, _WORDS)}
    built = []
    with torch.random.fork_rng(devices=[]):
        for number in range(LAYERS):
            torch.manual_seed(400 + number)
            if number in key_of:
                key = key_of[number]
                built.append(spec(key, _FROZEN.get(model) == key, _DETACHED.get(model) == number))
            elif model == "copies" and number > 2 * LAYERS // 3:
                built.append(jobs._Squeeze())
            else:
                built.append(ends[number](_WIDTH) if number in ends else jobs._Mix(_WIDTH, _WIDTH))
    return built


_LAYERS_OF_JOBS, _BUILD = jobs.layers, deepspeed_job.build


def _tied_specs(model: str) -> list[Any]:
    from deepspeed.pipe import TiedLayerSpec

    return layers(model, lambda key, *how: TiedLayerSpec(key, Shared, key, *how))


@contextlib.contextmanager
def in_place_of_jobs(layers_of: Any) -> Iterator[None]:
    """Within it, `jobs.layers` is `layers_of`."""
    with mock.patch.object(jobs, "layers", layers_of):
        yield


def options(job: Job) -> dict[str, Any]:
    """The block "paci" of a job's config."""
    return job.config.get("paci", {})


def poison(job: Job) -> tuple[int, int, int] | None:
    """(stage, update, number of the parameter) whose gradient is made infinite; a key that DeepSpeed ignores."""
    return job.config.get("poison")


def build(job: Job, schedule: str | None = "paci", **module_options: Any) -> Any:
    """As `deepspeed_job.build`, of the models in `TIES` too."""
    with in_place_of_jobs(_tied_specs):
        # The engine's default, which the other tests' jobs do without.
        options = {"clip": "global", **job.config.get("paci", {})}
        engine = _BUILD(dataclasses.replace(job, config={**job.config, "paci": options}), schedule, **module_options)
    for parameter in engine.module.parameters():
        parameter.model_parallel = job.config.get("sliced", False)
    if poison(job):
        stage, update, number = poison(job)
        take_update = engine.take_update

        def poisoned(*args: Any) -> None:
            if (engine.stage_id, engine.global_steps) == (stage, update):
                weight = list(engine.module.parameters())[number]
                (weight._hp_grad if engine.using_bf16_optimizer else weight.grad).view(-1)[1] = torch.inf
            take_update(*args)

        engine.take_update = poisoned
    return engine


def train(job: Job, schedule: str | None = "paci", folder: str | None = None, load: bool = False) -> dict[str, Any]:
    """As `deepspeed_job.train`; "norm" holds the engine's gradient norm after every action, NaN before the first."""
    engine = build(job, schedule)
    norms = []
    act = deepspeed_job.act

    def late_act(engine: Any, job: Job, action: str, feed: Iterator, folder: str | None = None) -> float:
        name, _, value = action.partition("=")
        if name == "schedule":
            engine.set_pipeline_schedule(value)
            loss = float("nan")
        else:
            loss = act(engine, job, action, feed, folder)
        norm = engine.get_global_grad_norm()
        norms.append(float("nan") if norm is None else float(norm))
        return loss

    if load:
        path, _ = engine.load_checkpoint(folder, tag="common")
        assert path is not None
    with mock.patch.object(deepspeed_job, "act", late_act):
        result = deepspeed_job.follow(engine, job, schedule, folder)
    stats = engine.pipeline_stats() if hasattr(engine, "pipeline_stats") else {}
    return {**result, "norm": norms, "drift_bound": stats.get("drift_bound"), "steps": engine.global_steps}


class Runs:
    """Jobs with names; all those of equally many stages are carried out together, when the first of them is asked for.

    Args:
        calls: name -> the arguments of `train`: the job, and where it is not "paci", the schedule.
        folder: for checkpoints, a folder below for each.
    """

    def __init__(self, calls: dict[str, tuple[Any, ...]], folder: Path) -> None:
        self._calls, self._folder = calls, folder
        self._results: dict[str, list[dict[str, Any]]] = {}

    def __getitem__(self, name: str) -> list[dict[str, Any]]:
        """By stage, what `train` returned."""
        if name not in self._results:
            stages = self._calls[name][0].stages
            together = [other for other, (job, *_) in self._calls.items() if job.stages == stages]
            calls = [
                (*(*self._calls[other], "paci")[:2], str(self._folder / str(number)))
                for number, other in enumerate(together)
            ]
            self._results.update(zip(together, run(*calls), strict=True))
        return self._results[name]


def run(*calls: tuple[Any, ...], timeout: float = 280.0) -> list[list[dict[str, Any]]]:
    """Carry out several jobs of equally many stages, one after the other, on the same ranks.

    Args:
        calls: the arguments of `train` for each.
        timeout: for all of them.

    Returns:
        For each call, what `train` returned, by stage.
    """
    results = ranks.run_ranks(_train_all, calls[0][0].stages, (calls,), timeout=timeout)
    return [list(by_stage) for by_stage in zip(*results, strict=True)]


def _train_all(calls: tuple[tuple[Any, ...], ...]) -> list[dict[str, Any]]:
    return [train(*call) for call in calls]

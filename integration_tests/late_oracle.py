"""The reference with what comes late by design: other stages' norms, tied gradients; flushes, and switches to and fro.

Where the engine carries norms and sums about and takes what has arrived, this one writes every update's down, for ever,
and looks up the one that the written rule names.  At update v of stage s, with d the look-ahead and E the updates done
when the pipe was last empty, stage r contributes its squared norm of update

* v for r = s;  max(E, v) - 1 for r > s;
* for r < s the last one before F(i) of r, where i is the micro-batch whose forward precedes the update at s: in a
  drain the last micro-batch of all; or E - 1, where nothing has been updated since the pipe was empty;
* v - ceil((d_0 + 1) / a) for every r, where s holds a tied weight.

A stage that overflows skips its update; one that holds a tied weight takes what is not finite for zero instead.

Update k applies the tied gradients of every update up to k - j that has not been applied, oldest first, with
j = ceil((d_first - d_last) / a); under a flush, its own and then all that have not been applied.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from integration_tests import deepspeed_job, late_job, oracle
from integration_tests.jobs import Job
from integration_tests.oracle import Moment, Reference

__all__ = ["LateReference", "assert_equal", "run"]


def run(job: Job) -> list[Moment]:
    """Carry out a job's script; one moment per action."""
    return LateReference(job).run()


def assert_equal(job: Job, results: list[dict[str, Any]], rounding: float = 0.0) -> LateReference:
    """Every stage at every moment as the reference, gradient norms included.  Returns the reference."""
    reference = LateReference(job)
    deepspeed_job.assert_equal(results, reference.run(), rounding=rounding)
    if job.clip:
        for stage, result in enumerate(results):
            truth = pytest.approx([norms[stage] for norms in reference.norms], rel=max(2e-7, rounding), nan_ok=True)
            assert result["norm"] == truth, f"norms of stage {stage}"
    return reference


class LateReference(Reference):
    """A pipeline in one process.

    Attributes:
        norms: after every action, by stage, the norm that the latest update was clipped by; NaN before the first.
        used: (stage, update, other stage) -> the update whose norm that stage contributed; below 0, none.
        waits: key of a tied weight -> its j.
    """

    def __init__(self, job: Job) -> None:
        with late_job.in_place_of_jobs(late_job.layers):
            super().__init__(job)
        self.options = late_job.options(job)
        self.schedule = "paci"
        self.flushing = False
        self.emptied = 0  # E
        self.taken = 0  # micro-batches since the pipe was last empty
        self.norms: list[list[float]] = []
        self.used: dict[tuple[int, int, int], int] = {}
        self.squares: dict[tuple[int, int], torch.Tensor] = {}  # (stage, update) -> squared norm
        self.handed: dict[str, dict[int, dict[int, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
        self.stages = [_LateStage(self, job, number, stage.module) for number, stage in enumerate(self.stages)]

    def act(self, action: str) -> Moment:
        name, _, value = action.partition("=")
        if name == "schedule":
            moment = super().act("drain")
            self.schedule = value
        else:
            moment = super().act(action)
        self.norms.append([stage.norm for stage in self.stages])
        return dataclasses.replace(moment, action=action)

    @property
    def waits(self) -> dict[str, int]:
        return {
            key: math.ceil((self._behind(first) - self._behind(last)) / self._accumulation)
            for key in self.ties
            for first, *_, last in [self.holders(key)]
        }

    @property
    def ties(self) -> dict[str, tuple[int, ...]]:
        """Key of a tied weight -> the layers that share it."""
        return late_job.TIES.get(self.job.model, {})

    def holders(self, key: str) -> tuple[int, ...]:
        """The stages that hold a copy of a tied weight."""
        each = len(self.job.stage_layers(0))
        return tuple(number // each for number in self.ties[key])

    def _behind(self, stage: int) -> int:
        extra = self.options.get("extra_in_flight", self.job.extra_in_flight)
        last = len(self.stages) - 1
        if isinstance(extra, int):
            return last - stage + (math.ceil(extra * (last - stage) / last) if last else 0)
        return sum(1 + extra[link] for link in range(stage, last))

    def _drain(self) -> None:
        super()._drain()
        self._is_empty()

    def _is_empty(self) -> None:
        self._round = self.taken = 0
        self.emptied = self.stages[0].version

    def _rounds(self, batches: list[Any]) -> list[list[float]]:
        real = batches[0] is not None
        if real and not self.taken:
            self.flushing = self.schedule == "1f1b" or self.emptied < self.options.get("flush_warmup_steps", 0)
        if not (real and self.flushing):
            return self._one_by_one(batches)
        finished = self._one_by_one(batches)
        while any(stage.saved for stage in self.stages):
            for done, more in zip(finished, self._one_by_one([None]), strict=True):
                done.extend(more)
        for part in ("hand_in", "measure", "apply"):  # nobody goes on before all have come here
            for stage in self.stages:
                getattr(stage, part)()
        self._is_empty()
        return finished

    def _one_by_one(self, batches: list[Any]) -> list[list[float]]:
        finished: list[list[float]] = [[] for _ in self.stages]
        for batch in batches:
            self.taken += batch is not None
            for done, more in zip(finished, super()._rounds([batch]), strict=True):
                done.extend(more)
        return finished

    def others(self, stage: int, update: int) -> Iterator[torch.Tensor]:
        """What the other stages contribute to the squared norm of `update` at `stage`."""
        for other in range(len(self.stages)):
            if other != stage:
                if self.flushing:
                    at = update
                elif other > stage:
                    at = max(self.emptied, update) - 1
                else:
                    at = self._before_the_forward(stage, update, other)
                self.used[stage, update, other] = at
                yield self.square(other, at)

    def _before_the_forward(self, stage: int, update: int, other: int) -> int:
        """The last update of `other`, an earlier stage, before it made what `stage` last got before `update`."""
        finished = (update + 1 - self.emptied) * self._accumulation - 1
        forward = min(finished + self._behind(stage), self.taken - 1)
        return self.emptied + max(0, forward - self._behind(other)) // self._accumulation - 1

    def agreed(self, update: int) -> list[torch.Tensor]:
        """What all stages contribute to the squared norm of `update` at a stage that holds a tied weight."""
        at = update - math.ceil((self._behind(0) + 1) / self._accumulation)
        return [self.square(stage, at) for stage in range(len(self.stages))]

    def square(self, stage: int, update: int) -> torch.Tensor:
        """A squared norm, as others see it: 0 if there was none or it is not finite."""
        square = self.squares[stage, update] if update >= 0 else torch.zeros(())
        return square if square.isfinite() else torch.zeros(())


class _LateStage(oracle._Stage):
    """A stage that looks at the others when it updates."""

    def __init__(self, pipe: LateReference, job: Job, stage: int, module: nn.Sequential) -> None:
        super().__init__(job, stage, dict(zip(job.stage_layers(stage), module, strict=True)))
        self.pipe, self.number = pipe, stage
        self.norm = math.nan
        self.applied = dict.fromkeys(pipe.ties, 0)
        shared = [layer for layer in self.module if isinstance(layer, late_job.Shared)]
        self.shared = {layer.key: layer.weight for layer in shared if layer.weight.requires_grad}
        # DeepSpeed lists the shared weights first.
        ordered = nn.ModuleList(sorted(self.module, key=lambda layer: not isinstance(layer, late_job.Shared)))
        zero = job.precision != "bf16" and "zero_optimization" in job.config
        self._fp32 = job.precision == "fp32" and not zero
        kind = oracle._Updater if self._fp32 else _ZeroUpdater if zero else oracle._MasterUpdater
        self._updater = kind(job, ordered)

    def step(self) -> None:
        if self.pipe.flushing:
            return  # when the batch is done: `hand_in`, `measure`, `apply`
        self.hand_in()
        self.measure()
        self.apply()

    def hand_in(self) -> None:
        """Give the gradients of shared weights to the others."""
        stage, update, number = late_job.poison(self.pipe.job) or (None, None, 0)
        if (stage, update) == (self.number, self.version):
            self._gradient(self._updater.parameters[number]).view(-1)[1] = torch.inf
        for key, weight in self.shared.items():
            if self._fp32 and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            self.pipe.handed[key][self.version][self.number] = self._gradient(weight).clone()

    def measure(self) -> None:
        """Take the sums that are due, and say this stage's part of the norm."""
        for key, weight in self.shared.items():
            self._take_sums(key, self._gradient(weight))
        updater = self._updater
        if updater.optimizer:
            updater.reduce()
        if any(len(self.pipe.holders(key)) > 1 for key in self.shared):
            for gradient in updater.gradients():
                gradient[~gradient.isfinite()] = 0
        replicated = [weight for key, weight in self.shared.items() if self.pipe.holders(key)[0] != self.number]
        counted = [
            self._gradient(weight)
            for weight in updater.parameters
            if all(weight is not other for other in replicated) and self._gradient(weight) is not None
        ]
        dtype = torch.float64 if isinstance(updater, _ZeroUpdater) else torch.float32
        norms = [gradient.to(dtype).norm(2.0) for gradient in counted]
        self.pipe.squares[self.number, self.version] = (
            torch.stack(norms).pow(2.0).sum().float() if norms else torch.zeros(())
        )

    def apply(self) -> None:
        """Clip, update, count."""
        updater = self._updater
        goes_on = self._clip()
        if updater.optimizer:
            if not goes_on:
                for gradient in updater.gradients():
                    gradient.zero_()
            else:
                with torch.autograd._unsafe_preserve_version_counter(tuple(updater.parameters)):
                    updater.update()
                if updater.schedule:
                    updater.schedule.step()
        self.version += 1
        self.windows.append(math.fsum(self.window) / len(self.window))
        self.window.clear()

    def weights(self) -> dict[str, torch.Tensor]:
        named = {}
        for number, layer in enumerate(self.module, self._first_layer):
            root = f"tied_modules.{layer.key}" if isinstance(layer, late_job.Shared) else f"{number}"
            named.update((f"{root}.{name}", value.detach().clone()) for name, value in layer.named_parameters())
        return named

    def _take_sums(self, key: str, gradient: torch.Tensor) -> None:
        handed, now = self.pipe.handed[key], self.version
        if self.pipe.flushing:
            due = [now, *range(self.applied[key], now)]
        else:
            due = list(range(self.applied[key], now - self.pipe.waits[key] + 1))
        gradient.zero_()
        for update in due:
            copies = handed[update]
            assert set(copies) == set(self.pipe.holders(key)), "the rule names a sum that is not there yet"
            gradient.add_(sum(copies[stage] for stage in sorted(copies)))
        self.applied[key] = max(self.applied[key], *(update + 1 for update in due), 0)

    def _clip(self) -> bool:
        """Scale the gradients; False if they are to be thrown away."""
        pipe, limit = self.pipe, self.pipe.job.clip
        square = pipe.squares[self.number, self.version].clone()
        if limit and pipe.options.get("clip", "global") == "global" and len(pipe.stages) > 1:
            if self.shared and not pipe.flushing:
                square = torch.stack(pipe.agreed(self.version)).sum()
            else:
                square += torch.stack(list(pipe.others(self.number, self.version))).sum()
        self.norm = square.sqrt().item()
        if not square.isfinite():
            self.norm = math.inf
            return False
        if limit:
            norm = square.sqrt() + 1e-6
            factor = self._updater.factor(norm)
            self._updater.factors.append(factor.item())
            if factor < 1:
                self._updater.scale(factor) if isinstance(self._updater, _ZeroUpdater) else self._scale(factor)
        return True

    def _scale(self, factor: torch.Tensor) -> None:
        for gradient in self._updater.gradients():
            gradient.mul_(factor)

    def _gradient(self, weight: nn.Parameter) -> torch.Tensor | None:
        """Where the accumulated gradient of a parameter is."""
        updater = self._updater
        if self._fp32:
            return weight.grad
        for parameters, _, total in updater._flat:
            for parameter, piece in zip(parameters, updater._pieces(parameters, total), strict=True):
                if parameter is weight:
                    return piece.view_as(parameter)
        raise KeyError(weight)


class _ZeroUpdater(oracle._MasterUpdater):
    """ZeRO stage 1: the norm is taken in fp64, and what the optimizer gets is scaled in fp32, after the rounded sum."""

    def __init__(self, job: Job, module: nn.Module) -> None:
        super().__init__(job, module)
        self._factor: torch.Tensor | None = None
        if self.optimizer:
            self.optimizer.register_step_pre_hook(self._scale_masters)

    def factor(self, norm: torch.Tensor) -> torch.Tensor:
        return 1.0 / (norm / self.clip)

    def scale(self, factor: torch.Tensor) -> None:
        """Scale the gradients of the next step."""
        self._factor = factor

    def _scale_masters(self, *_: Any) -> None:
        factor, self._factor = self._factor, None
        if factor is not None:
            for _, master, _ in self._flat:
                master.grad.mul_(factor)

"""The reference with predictions: stale forwards on the weights that steps of other optimizers, on copies, leave."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn

from integration_tests import jobs, late_oracle, replica_oracle
from integration_tests.jobs import Job
from integration_tests.late_oracle import LateReference

__all__ = ["PredictingReference"]


class PredictingReference(LateReference):
    """The reference, whose stale forwards run on the weights that new optimizers' steps leave."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.stages = [_PredictingStage(self, job, number, stage.module) for number, stage in enumerate(self.stages)]


class _PredictingStage(late_oracle._LateStage):
    def __init__(self, pipe: PredictingReference, job: Job, number: int, module: nn.Sequential) -> None:
        super().__init__(pipe, job, number, module)
        self._job, self._asked = job, job.config["paci"]["prediction"]
        self._stale = 0
        self._real = None

    def forward(self, index, batch, labels):
        ahead = index // self.pipe._accumulation - (self.version - self.pipe.emptied)
        interval = {"every": 1, "window": 1 << 30}.get(self._asked, self._asked)
        if ahead and self._updater.optimizer and not self.pipe.flushing:
            if self._stale % interval == 0:
                self._predict(ahead)
            self._stale += 1
        try:
            return super().forward(index, batch, labels)
        finally:
            if interval == 1:
                self._restore()

    def step(self):
        self._restore()
        self._stale = 0
        super().step()

    def weights(self):
        """The real ones; those that are there stay."""
        there, real = [weight.detach().clone() for weight in self.module.parameters()], self._real
        self._restore()
        shown = super().weights()
        self._write(self.module.parameters(), there)
        self._real = real
        return shown

    def _restore(self):
        if self._real is not None:
            self._write(self.module.parameters(), self._real)
            self._real = None

    def _gather(self, predicted, parameters, own):
        """Every replica's shard as that replica predicts it."""
        replicas = own._meeting.replicas
        shard = -(-predicted.numel() // (2 * replicas)) * 2
        places = list(
            torch.arange(predicted.numel()).split(
                [
                    *(parameter.numel() for parameter in parameters),
                    predicted.numel() - sum(parameter.numel() for parameter in parameters),
                ]
            )
        )
        if self._job.config.get("zero_optimization", {}).get("round_robin_gradients"):
            places = [place for first in range(replicas) for place in places[:-1][first::replicas]] + places[-1:]
        mine = torch.cat(places)[own._replica * shard :][:shard]
        with torch.no_grad():
            kept = predicted[mine]
            predicted.zero_()[mine] = kept
            own._meeting.average(own._replica, [predicted], torch.float32)
            predicted.mul_(replicas)

    @staticmethod
    def _write(weights, values):
        for weight, value in zip(weights, values, strict=True):
            weight.data.copy_(value)

    def _expected(self, original):
        """What Adam's momentum expects for a parameter as the optimizer knows it; None before the first update."""
        optimizer = self._updater.optimizer
        state, beta = optimizer.state.get(original), optimizer.param_groups[0]["betas"][0]
        return state["exp_avg"] / (1 - beta ** state["step"]) if state else None

    def _late(self, original):
        """Which elements of it are of weights that other stages hold as well."""
        late = [weight for key, weight in self.shared.items() if len(set(self.pipe.holders(key))) > 1]
        for parameters, master, _ in getattr(self._updater, "_flat", ()):
            ends = list(itertools.accumulate(parameter.numel() for parameter in parameters))
            for parameter, end in zip(parameters, ends, strict=True):
                if master is original and any(parameter is weight for weight in late):
                    yield slice(end - parameter.numel(), end)
        if any(original is weight for weight in late):
            yield slice(None)

    def _predict(self, ahead):
        """Steps of an optimizer of its own, on copies, with the part for a gradient or what Adam's momentum expects."""
        self._restore()
        self._real = [weight.detach().clone() for weight in self.module.parameters()]
        updater, done = self._updater, len(self.window)
        optimizer = jobs.optimizer(self._job)(
            [
                {**group, "params": [weight.detach().clone() for weight in group["params"]]}
                for group in updater.optimizer.param_groups
            ]
        )
        optimizer.load_state_dict(copy.deepcopy(updater.optimizer.state_dict()))  # else it shares the tensors
        for group in optimizer.param_groups:
            group["lr"] *= self._job.config["paci"].get("prediction_reach", 1.0)
        copies = [weight for group in optimizer.param_groups for weight in group["params"]]
        originals = [weight for group in updater.optimizer.param_groups for weight in group["params"]]
        flat = {id(master): total for _, master, total in getattr(updater, "_flat", ())}
        for _ in range(ahead):
            for weight, original in zip(copies, originals, strict=True):
                expected = self._expected(original)
                if done:
                    total = flat.get(id(original), original.grad)
                    weight.grad = None if total is None else total.float() * (self.pipe._accumulation / done)
                    if updater.factors and weight.grad is not None:
                        weight.grad.mul_(torch.tensor(updater.factors[-1]).clamp(max=1.0))
                    for place in self._late(original):
                        weight.grad[place] = 0.0 if expected is None else expected[place]
                else:
                    weight.grad = expected
            optimizer.step()
        for weight, original in zip(copies, originals, strict=True):
            for place in self._late(original) if self._expected(original) is None else ():
                weight.data[place] = original.data[place]
        if flat and isinstance(updater.reduce, replica_oracle._Reduce):
            for predicted, (parameters, *_) in zip(copies, updater._flat, strict=True):
                self._gather(predicted, parameters, updater.reduce)
        if not flat:
            self._write(originals, copies)
        for (parameters, _, _), predicted in zip(getattr(updater, "_flat", ()), copies, strict=False):
            pieces = updater._pieces(parameters, predicted)
            self._write(parameters, [piece.view_as(weight) for weight, piece in zip(parameters, pieces, strict=True)])

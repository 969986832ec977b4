"""The single process of `megatron_oracle`, whose stale forwards run on the weights that other optimizers' steps leave.

A new optimizer of the same kind steps copies of the real weights, from a copy of the state, with what a replica has
summed so far in the place of the window's gradient; what Megatron's stages predict comes from no such optimizer.
"""

from __future__ import annotations

import copy

import torch

from integration_tests.megatron_job import GptJob, Trained
from integration_tests.megatron_oracle import Stage, oracle_all

__all__ = ["predicting_all"]


class _PredictingStage(Stage):
    """A stage whose replicas may each see other weights.

    Attributes:
        predicted: by replica, the weights that stand in the place of the real ones; None for none.
    """

    def __init__(self, job: GptJob, number: int) -> None:
        self._replicas = range(job.data_parallel)
        asked = job.paci.get("prediction", "off")
        self._interval = {"off": 0, "every": 1, "window": 1 << 30}.get(asked, asked)
        super().__init__(job, number)

    def _restart(self) -> None:
        super()._restart()
        self._stale = [0 for _ in self._replicas]
        self._done = [0 for _ in self._replicas]
        self.predicted: list[list[torch.Tensor] | None] = [None for _ in self._replicas]
        self._real = [weight.detach().clone() for weight in self.model.parameters()]

    def forward(self, micro: int, replica: int, received: torch.Tensor | None) -> torch.Tensor:
        ahead = micro // self.job.accumulation - self.version
        if ahead and self._interval:
            if self._stale[replica] % self._interval == 0:
                self.predicted[replica] = self._predict(ahead, replica)
            self._stale[replica] += 1
        self._show(self.predicted[replica])
        output = super().forward(micro, replica, received)
        if self._interval == 1:
            self.predicted[replica] = None
        return output

    def backward(self, micro: int, replica: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        self._show(self.predicted[replica])
        self._done[replica] += 1
        return super().backward(micro, replica, gradient)

    def step(self, stages: list[Stage], micro: int, emptied: int) -> None:
        self._show(None)
        super().step(stages, micro, emptied)

    def _show(self, weights: list[torch.Tensor] | None) -> None:
        for weight, value in zip(self.model.parameters(), self._real if weights is None else weights, strict=True):
            weight.data.copy_(value)

    def _predict(self, ahead: int, replica: int) -> list[torch.Tensor]:
        """All of it from this replica's part; or every replica's shard from its own."""
        if not self.job.distributed_optimizer:
            return self._stepped(ahead, replica)
        mine = [self._stepped(ahead, each) for each in self._replicas]
        result = [torch.empty_like(weight) for weight in self._real]
        numbers = {parameter: number for number, parameter in enumerate(self.model.parameters())}
        for buffer in self.model.buffers:
            for bucket in buffer.buckets:
                size = bucket.grad_data.numel() // len(self._replicas)
                for parameter in bucket.params_list:
                    begin = buffer.param_index_map[parameter][0] - bucket.offset
                    owners = (begin + torch.arange(parameter.numel())) // size
                    for each in self._replicas:
                        taken = (owners == each).view(parameter.shape)
                        result[numbers[parameter]][taken] = mine[each][numbers[parameter]][taken]
        return result

    def _stepped(self, ahead: int, replica: int) -> list[torch.Tensor]:
        """The weights after `ahead` steps, in the model's dtype and order."""
        self._show(None)
        result = [weight.clone() for weight in self._real]
        places = {parameter.data_ptr(): number for number, parameter in enumerate(self.model.parameters())}
        for number, parameter in enumerate(self.model.parameters()):
            if getattr(parameter, "main_param", None) is not None:
                places[parameter.main_param.data_ptr()] = number
        for chained in self.optimizer.chained_optimizers:
            inner = chained.optimizer
            groups = [
                {**group, "params": [weight.detach().clone() for weight in group["params"]]}
                for group in inner.param_groups
            ]
            fresh = type(inner)(groups, lr=self.job.lr)
            fresh.load_state_dict(copy.deepcopy(inner.state_dict()))
            for group in fresh.param_groups:
                group["lr"] *= self.job.paci.get("prediction_reach", 1.0)
            pairs = [
                (weight, value)
                for group, mine in zip(inner.param_groups, fresh.param_groups, strict=True)
                for weight, value in zip(group["params"], mine["params"], strict=True)
            ]
            for _ in range(ahead):
                for weight, value in pairs:
                    value.grad = self._gradient(inner, weight, places[weight.data_ptr()], replica)
                fresh.step()
            for weight, value in pairs:
                number = places[weight.data_ptr()]
                result[number] = value.detach().view(result[number].shape).to(result[number].dtype)
        return result

    def _gradient(
        self, inner: torch.optim.Optimizer, weight: torch.Tensor, number: int, replica: int
    ) -> torch.Tensor | None:
        tied = list(self.model.parameters())[number] is self.tied
        if self._done[replica] and not tied:
            gradient = self.sums[replica][number].float().view(weight.shape)
            gradient = gradient * (self.job.accumulation / self._done[replica])
            limit, norms = self.job.clip_grad, self.seen.norms
            if limit and norms and limit / (norms[-1] + 1e-6) < 1:
                gradient = gradient * (limit / (norms[-1] + 1e-6))
            return gradient
        group = next(group for group in inner.param_groups if any(weight is other for other in group["params"]))
        state = inner.state.get(weight)
        is_sgd = isinstance(inner, torch.optim.SGD)
        if not state or (is_sgd and state.get("momentum_buffer") is None):
            return None
        if is_sgd:
            return state["momentum_buffer"] * (1 - group["momentum"]) - group["weight_decay"] * weight.detach()
        return state["exp_avg"] / (1 - group["betas"][0] ** state["step"])


def predicting_all(jobs: list[GptJob]) -> list[list[Trained]]:
    """As `oracle_all`, of jobs that may have the option "prediction"."""
    return oracle_all(jobs, _PredictingStage)

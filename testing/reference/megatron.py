"""What a Megatron job must give: stages of megatron-core's own parts, side by side in one process.

A stage's model, gradient buffer and optimizer are megatron-core's, so that equality can be asked for to the last bit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from testing.megatron_model import (
    GptJob,
    build,
    import_megatron,
    mean_loss,
    micro_batch,
    set_up,
    token_loss,
    tokens_of,
)
from testing.reference import rules
from testing.reference.pipeline import Pipeline
from testing.reference.prediction import expected_gradient, stepped_copies

__all__ = ["Expected", "MegatronStage", "train_all"]


@dataclass
class Expected:
    """What one stage must give.

    Attributes:
        losses: of each call, the micro-batches' (last stage, replica 0).
        weights: name -> weight at the end.
        norms: the gradient norm that each update returned.
        drift: of every micro-batch.
    """

    losses: list[list[float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    drift: list[int] = field(default_factory=list)


class MegatronStage:
    """One stage of a job; a `stage.Stage`.

    Args:
        job: what is trained.
        number: the stage.
    """

    divides = "loss"

    def __init__(self, job: GptJob, number: int) -> None:
        self.job, self.is_last = job, number == job.stages - 1
        # The sum over the tokens of an update is no mean over its micro-batches.
        self.loss_scale = float(job.accumulation) if job.per_token else 1.0
        single = dataclasses.replace(job, overlap_grad_reduce=False, overlap_param_gather=False, layer_wise=False)
        self.model, self.optimizer = build(single, number, job.stages, 1)
        self.weights = list(self.model.parameters())
        self.norms: list[float] = []
        tied = self.model.module.shared_embedding_or_output_weight() if job.tied else None
        self._tied = next((place for place, weight in enumerate(self.weights) if weight is tied), None)
        self._group = _NormGroup()
        for optimizer in self.optimizer.chained_optimizers:
            optimizer.grad_stats_parallel_group = self._group
        self._restart()

    def _restart(self) -> None:
        replicas = range(self.job.data_parallel)
        self._sums = [[torch.zeros_like(weight.main_grad) for weight in self.weights] for _ in replicas]
        self._taken: torch.Tensor | None = None

    def compute(self, batch: torch.Tensor, received: torch.Tensor | None) -> torch.Tensor:
        """The output of the layers, or the loss."""
        tokens, labels = batch[:, :-1], batch[:, 1:]
        if received is not None:
            self.model.module.set_input_tensor(received)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        output = self.model(tokens, positions, None, labels=labels if self.is_last else None)
        if not self.is_last:
            return output
        return (token_loss(labels, output) if self.job.per_token else mean_loss(output))[0]

    def accumulate(self, replica: int) -> None:
        """Take what one backward has left in the gradient buffer."""
        for total, weight in zip(self._sums[replica], self.weights, strict=True):
            total += weight.main_grad
        self.model.zero_grad_buffer()

    def _mean(self, place: int) -> torch.Tensor:
        """The mean over the replicas of a weight's gradient, or over the tokens of all of them."""
        if self.job.per_token:
            begin = len(self.norms) * self.job.accumulation
            micros = range(begin, begin + self.job.accumulation)
            tokens = sum(tokens_of(micro, replica) for replica in range(self.job.data_parallel) for micro in micros)
            return sum(sums[place] for sums in self._sums) * (1.0 / torch.tensor(tokens))
        return sum(sums[place] * (1.0 / self.job.data_parallel) for sums in self._sums)

    def tied_gradient(self, key: str) -> list[torch.Tensor]:
        """The mean over the replicas."""
        return [self._mean(self._tied)]

    def take_tied(self, key: str, sums: list[list[torch.Tensor]]) -> None:
        """The mean over the replicas."""
        self._taken = torch.zeros_like(self.weights[self._tied].main_grad)
        for [gradient] in sums:
            self._taken.add_(gradient)

    def measure(self) -> torch.Tensor:
        """The squared norm as the optimizer measures it."""
        for place, weight in enumerate(self.weights):
            weight.main_grad.copy_(self._taken if place == self._tied else self._mean(place))
        self._group.total = None
        self.optimizer.prepare_grads()
        self.optimizer.get_grad_norm()
        return self._group.own

    def apply(self, square: torch.Tensor) -> None:
        """The optimizer's own step."""
        self._group.total = square
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.weights)):
            ok, norm, _ = self.optimizer.step()
        assert ok
        self.norms.append(norm)
        self.optimizer.zero_grad()
        self.model.zero_grad_buffer()
        self._restart()

    def predict(self, ahead: int, scale: float) -> list[list[torch.Tensor]]:
        """Each replica predicts all weights from its own part of the gradient, or every replica a shard of them."""
        values = [self._predicted(ahead, scale, sums) for sums in self._sums]
        if not self.job.distributed_optimizer:
            return values
        gathered = [torch.empty_like(weight) for weight in self.weights]
        for place, owners in self._owners():
            for replica, mine in enumerate(values):
                taken = (owners == replica).view(gathered[place].shape)
                gathered[place][taken] = mine[place][taken]
        return [gathered] * len(values)

    def _owners(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The number of each weight, and the replica that each of its elements belongs to."""
        places = {weight: place for place, weight in enumerate(self.weights)}
        for buffer in self.model.buffers:
            for bucket in buffer.buckets:
                size = bucket.grad_data.numel() // self.job.data_parallel
                for weight in bucket.params_list:
                    begin = buffer.param_index_map[weight][0] - bucket.offset
                    yield places[weight], (begin + torch.arange(weight.numel())) // size

    def _predicted(self, ahead: int, scale: float, sums: list[torch.Tensor]) -> list[torch.Tensor]:
        """All weights, in the model's dtype and order."""
        places = {weight.data_ptr(): place for place, weight in enumerate(self.weights)}
        for place, weight in enumerate(self.weights):
            if getattr(weight, "main_param", None) is not None:
                places[weight.main_param.data_ptr()] = place
        result = [weight.detach().clone() for weight in self.weights]
        for chained in self.optimizer.chained_optimizers:
            inner = chained.optimizer

            def gradient(stepped: torch.Tensor, inner: Any = inner) -> torch.Tensor | None:
                place = places[stepped.data_ptr()]
                if not scale or place == self._tied:
                    return expected_gradient(inner, stepped)
                found, limit = sums[place].float().view(stepped.shape) * scale, self.job.clip_grad
                if limit and self.norms and limit / (self.norms[-1] + 1e-6) < 1:
                    found = found * (limit / (self.norms[-1] + 1e-6))
                return found

            reach = self.job.paci.get("prediction_reach", 1.0)
            for stepped, value in stepped_copies(inner, ahead, reach, gradient):
                place = places[stepped.data_ptr()]
                result[place] = value.view(result[place].shape).to(result[place].dtype)
        return result


class _NormGroup(dist.ProcessGroup):
    """What a stage's optimizer sums its squared gradient norm over.

    Attributes:
        own: the stage's squared norm, as the optimizer brought it last.
        total: what the sum shall be; None leaves it.
    """

    def __init__(self) -> None:
        super().__init__(0, 1)
        self.own, self.total = torch.zeros(()), None

    def allreduce(self, tensors: list[torch.Tensor], options: dist.AllreduceOptions) -> dist.Work:
        if options.reduceOp == dist.ReduceOp.SUM:
            self.own = tensors[0].detach().reshape(()).clone()
            if self.total is not None:
                tensors[0].copy_(self.total)
        return _Done()


class _Done(dist.Work):
    def wait(self, *_: object) -> bool:
        return True


def train_all(jobs: list[GptJob]) -> list[list[Expected]]:
    """What each stage of every job must give."""
    import_megatron()
    results = []
    for job in jobs:
        set_up(GptJob(stages=1))
        torch.autograd.set_multithreading_enabled(False)
        results.append(_train(job))
    return results


def _train(job: GptJob) -> list[Expected]:
    stages = [MegatronStage(job, number) for number in range(job.stages)]
    pipeline = Pipeline(
        stages,
        job.accumulation,
        rules.look_aheads(job.stages),
        replicas=job.data_parallel,
        ties={"embedding": (0, job.stages - 1)} if job.tied else {},
        global_norm=job.paci.get("clip") != "stage",
        agreed=set(range(job.stages)) if job.tied else set(),
        prediction=job.paci.get("prediction", "off"),
    )
    planned = bool({"drain_interval", "train_iters"} & set(job.paci))
    for start, stop, flushed in _between_drains(job):
        begin, end = start * job.accumulation, stop * job.accumulation
        pipeline.train(_batches(job, range(begin, end)), flush=flushed)
        if planned or flushed or stop < job.calls:
            pipeline.drain()
        else:
            pipeline.lead(_batches(job, range(end, end + pipeline.ahead[0])))
    return [
        Expected(
            losses=run.windows,
            weights={
                name: value.detach().clone()
                for (name, _), value in zip(stage.model.module.named_parameters(), run.values(), strict=True)
            },
            norms=stage.norms,
            drift=run.drift,
        )
        for stage, run in zip(stages, pipeline.runs, strict=True)
    ]


def _batches(job: GptJob, micros: range) -> list[list[torch.Tensor]]:
    replicas = range(job.data_parallel)
    return [[micro_batch(micro, replica, lengths=job.lengths) for replica in replicas] for micro in micros]


def _between_drains(job: GptJob) -> Iterator[tuple[int, int, bool]]:
    """The first call of each part of the stream that ends with an empty pipe, the next after it, if it flushes."""
    every = job.paci.get("drain_interval", job.calls)
    flushes = [schedule == "1f1b" for schedule in job.schedules or ("paci",) * job.calls]
    flushes[: job.paci.get("flush_warmup_steps", 0)] = [True] * min(job.paci.get("flush_warmup_steps", 0), job.calls)
    start = 0
    for call, (flushed, flushes_next) in enumerate(itertools.zip_longest(flushes, flushes[1:]), 1):
        if call % every == 0 or call == job.calls or flushed or flushes_next:
            yield start, call, flushed
            start = call

"""What a job must give, from a single process: all stages side by side, each op in its round, no link, no engine.

Written from the definition of the stream alone, and independent of the package: stage s runs P-1-s micro-batches ahead
of its backwards and updates after every a-th of them.  A stage's model, gradient buffer and optimizer are
megatron-core's own, so that equality can be asked for to the last bit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist

from integration_tests.megatron_job import SEQUENCE, GptJob, Trained, build, mean_loss, micro_batch, prepare, set_up

__all__ = ["Stage", "oracle_all"]


class Stage:
    """One stage: its weights, and the micro-batches of every replica that are between forward and backward."""

    def __init__(self, job: GptJob, number: int) -> None:
        self.job, self.number, self.last = job, number, number == job.stages - 1
        alone = dataclasses.replace(job, overlap_grad_reduce=False, layer_wise=False)
        self.model, self.optimizer = build(alone, number, job.stages, 1)
        self.seen = Trained()
        self.norms = _Norms(job, number)
        for optimizer in self.optimizer.chained_optimizers:
            optimizer.grad_stats_parallel_group = self.norms
        self.tied = self.model.module.shared_embedding_or_output_weight() if job.tied else None
        self.live: dict[tuple[int, int], tuple[torch.Tensor | None, torch.Tensor]] = {}
        self.version = 0
        self.born: dict[int, int] = {}
        self.drifts: list[int] = []
        self.handed: list[torch.Tensor] = []
        self._restart()

    def _restart(self) -> None:
        self.sums = [
            [torch.zeros_like(p.main_grad) for p in self.model.parameters()] for _ in range(self.job.data_parallel)
        ]
        self.losses: list[list[float]] = [[] for _ in range(self.job.data_parallel)]

    def forward(self, micro: int, replica: int, received: torch.Tensor | None) -> torch.Tensor:
        batch = micro_batch(micro, replica)
        tokens, labels = batch[:, :-1], batch[:, 1:]
        positions = torch.arange(SEQUENCE).expand_as(tokens)
        if received is not None:
            received = received.detach().requires_grad_()
            self.model.module.set_input_tensor(received)
        output = self.model(tokens, positions, None, labels=labels if self.last else None)
        if self.last:
            output, entry = mean_loss(output)
            self.losses[replica].append(entry["lm loss"].item())
            output = output / self.job.accumulation
        self.live[micro, replica] = received, output
        self.born[micro] = self.version
        return output.detach()

    def backward(self, micro: int, replica: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        received, output = self.live.pop((micro, replica))
        self.model.zero_grad_buffer()
        torch.autograd.backward(output, gradient)
        for total, parameter in zip(self.sums[replica], self.model.parameters(), strict=True):
            total += parameter.main_grad
        if replica == self.job.data_parallel - 1:
            self.drifts.append(self.version - self.born.pop(micro))
        return None if received is None else received.grad

    def step(self, stages: list[Stage], micro: int, emptied: int) -> None:
        """The update after the backward before which this stage's latest forward was of `micro`.

        Args:
            stages: all of them.
            micro: counted since the pipe was last empty.
            emptied: updates done then.
        """
        self.reduce()
        self.tie(stages, self.version - -(-(self.job.stages - 1) // self.job.accumulation))
        self.norms.look_up(stages, self.version, micro, emptied)
        self.update()

    def reduce(self) -> None:
        """The mean gradient over the replicas."""
        for parameter, *sums in zip(self.model.parameters(), *self.sums, strict=True):
            parameter.main_grad.copy_(sum(total * (1.0 / self.job.data_parallel) for total in sums))
        if self.tied is not None:
            self.handed.append(self.tied.main_grad.clone())

    def tie(self, stages: list[Stage], due: int) -> None:
        """The gradient of the tied weight: the sum of that update.  Those of flushed updates wait for no later one."""
        if self.tied is not None:
            self.tied.main_grad.zero_()
            if due >= min(self.version, _warmup(self.job)):
                self.tied.main_grad.add_(stages[0].handed[due] + stages[-1].handed[due])

    def measure(self) -> None:
        """Know this stage's norm of the update, before it."""
        self.norms.begin()
        self.optimizer.prepare_grads()
        self.optimizer.get_grad_norm()

    def update(self) -> None:
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.model.parameters())):
            ok, norm, _ = self.optimizer.step()
        self.optimizer.zero_grad()
        assert ok
        self.seen.norms.append(norm)
        self.seen.losses.append(self.losses[0])
        self.version += 1
        self._restart()


class _Norms(dist.ProcessGroup):
    """What a stage's optimizer sums its squared gradient norm over: the stages' norms, as old as the written rule says.

    Attributes:
        squares: this stage's squared norm of every update.
    """

    def __init__(self, job: GptJob, stage: int) -> None:
        super().__init__(0, 1)
        self.job, self.stage = job, stage
        self.squares: list[torch.Tensor] = []

    def begin(self) -> None:
        """An update begins whose squared norm is yet to be summed."""
        self.others, self.all_late, self.measured = [], False, False

    def agree(self, stages: list[Stage]) -> None:
        """Under a flush: every stage has measured its norm of this update, and each takes all of them."""
        self.measured = True
        self.others = [other.norms.squares[-1] for other in stages if other.number != self.stage]

    def look_up(self, stages: list[Stage], update: int, micro: int, emptied: int) -> None:
        """The rule, for the stage's `update`."""
        self.begin()
        ahead = [self.job.stages - 1 - stage for stage in range(self.job.stages)]
        self.all_late = self.job.tied
        for other in stages:
            if self.all_late:
                at = update - math.ceil((ahead[0] + 1) / self.job.accumulation)
            elif other.number == self.stage or self.job.paci.get("clip") == "stage":
                continue
            elif other.number > self.stage:
                at = update - 1
            else:
                at = emptied - 1 + max(0, micro - ahead[other.number]) // self.job.accumulation
            self.others.append(other.norms.squares[at] if at >= 0 else torch.zeros(()))

    def allreduce(self, tensors: list[torch.Tensor], options: dist.AllreduceOptions) -> dist.Work:
        if options.reduceOp == dist.ReduceOp.SUM:
            own = tensors[0].detach().reshape(()).clone()
            if not self.measured:
                self.squares.append(own)
            others = torch.stack(self.others).sum() if self.others else torch.zeros(())
            tensors[0].copy_(others if self.all_late else own + others)
        return _Done()


class _Done(dist.Work):
    def wait(self, *_: object) -> bool:
        return True


def oracle_all(jobs: list[GptJob], kind: type[Stage] = Stage) -> list[list[Trained]]:
    """For every job, what each of its stages must give (of replica 0); `kind` says what a stage is."""
    prepare()
    results = []
    for job in jobs:
        set_up(GptJob(stages=1))
        torch.autograd.set_multithreading_enabled(False)
        results.append(_oracle(job, kind))
    return results


def _warmup(job: GptJob) -> int:
    return job.paci.get("flush_warmup_steps", 0)


def _between_drains(job: GptJob) -> Iterator[tuple[int, int, bool]]:
    """The first call of each part of the stream that ends with an empty pipe, the next after it, if it flushes."""
    every = job.paci.get("drain_interval", job.calls)
    start = 0
    for call in range(1, job.calls + 1):
        named = bool(job.schedules) and job.schedules[call - 1] == "1f1b"
        flushed = named or call <= _warmup(job)
        if call % every == 0 or call == job.calls or flushed:
            yield start, call, flushed
            start = call


def _flushed(stages: list[Stage], batch: range) -> None:
    """A batch of the flushed schedule: no weight moves before all of it is done."""
    replicas = range(stages[0].job.data_parallel)
    for micro, replica in itertools.product(batch, replicas):
        passed = None
        for stage in stages:
            passed = stage.forward(micro, replica, passed)
        passed = None
        for stage in reversed(stages):
            passed = stage.backward(micro, replica, passed)
    for stage in stages:
        stage.reduce()
    for stage in stages:
        stage.tie(stages, stage.version)
        stage.measure()
    for stage in stages:
        stage.norms.agree(stages)
        stage.update()


def _oracle(job: GptJob, kind: type[Stage]) -> list[Trained]:
    stages = [kind(job, number) for number in range(job.stages)]
    last = job.stages - 1
    planned = bool({"drain_interval", "train_iters"} & set(job.paci))
    for start, stop, flushed in _between_drains(job):
        begin, end = start * job.accumulation, stop * job.accumulation
        if flushed:
            _flushed(stages, range(begin, end))
            continue
        gradients: dict[tuple[int, int, int], torch.Tensor | None] = {}
        for turn in range(begin, end + last):
            for replica in range(job.data_parallel):
                activation = None
                for stage in stages:
                    if turn < end + (0 if planned else last - stage.number):
                        activation = stage.forward(turn, replica, activation)
            for stage in stages:
                micro = turn - (last - stage.number)
                if begin <= micro < end:
                    for replica in range(job.data_parallel):
                        gradient = gradients.pop((stage.number + 1, micro, replica), None)
                        gradients[stage.number, micro, replica] = stage.backward(micro, replica, gradient)
                    if (micro + 1) % job.accumulation == 0:
                        newest = min(turn, end - 1) if planned else turn
                        stage.step(stages, newest - begin, start)
    for stage in stages:
        stage.seen.weights = {name: p.detach().clone() for name, p in stage.model.module.named_parameters()}
        stage.seen.stats = {"drifts": stage.drifts}
    return [stage.seen for stage in stages]

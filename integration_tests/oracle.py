"""The reference: all stages of an asynchronous pipeline in one process, as plain modules, from the definition alone.

Round i of a pipe that was empty at round 0: every stage, first to last, runs the forward of micro-batch i (while there
are new ones) through its weights as they are at that moment, and then, where one is due, the backward of micro-batch
i - d through what that forward saved and the weights as they are by then; d is the number of stages behind this one.
After every a-th backward the stage steps its own optimizer.  A call of the training loop is a rounds with new
micro-batches; a drain is as many rounds without as it takes to finish what is under way.

The graph is cut between stages: a stage's input is a leaf, its gradient is what the stage before goes on with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from integration_tests import jobs
from integration_tests.jobs import Job

__all__ = ["Moment", "Reference", "run"]


@dataclass
class Moment:
    """What the reference, or an engine, has come to after one action of the script.

    Attributes:
        action: which one.
        loss: by stage; what the action returned: for "train" the mean over the micro-batches whose backward the stage
            has finished in the call (NaN if none), for "eval" the mean over all.
        version: by stage, updates applied so far.
        rate: by stage, the learning rate of its next update.
        drift: by stage, drift of every micro-batch whose backward is finished, in order, since the start.
        live: by stage, micro-batches between forward and backward.
        peak: by stage, the most of them at any time.
        weights: by stage, name -> parameter, by layer number.
    """

    action: str
    loss: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    drift: list[list[int]] = field(default_factory=list)
    live: list[int] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)


def run(job: Job) -> list[Moment]:
    """Carry out a job's script; one moment per action."""
    return Reference(job).run()


class Reference:
    """A pipeline in one process.

    Attributes:
        stages: its stages, first to last.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        layers = jobs.layers(job.model)
        self.stages = [_Stage(job, stage, layers) for stage in range(job.stages)]
        self._accumulation = job.accumulation
        self._data = jobs.data(job.model, job.first_micro_batch)
        self._round = 0

    def run(self) -> list[Moment]:
        """Carry out the script from where the pipeline stands; one moment per action."""
        return [self.act(action) for action in self.job.actions()]

    def act(self, action: str) -> Moment:
        """Carry out one action."""
        name, _, number = action.partition("=")
        if name == "train":
            finished = self._rounds([next(self._data) for _ in range(self._accumulation)])
            losses = [math.fsum(stage) / len(stage) if stage else math.nan for stage in finished]
        else:  # whatever else a training loop does comes to an empty pipe
            self._drain()
            losses = [self._evaluate() if name == "eval" else math.nan] * len(self.stages)
            if name == "accumulate":
                self._accumulation = int(number)
            elif name not in ("drain", "eval", "save"):
                raise ValueError(f"{action!r} is no action")
        return Moment(
            action,
            loss=losses,
            version=[stage.version for stage in self.stages],
            rate=[stage.rate() for stage in self.stages],
            drift=[list(stage.drift) for stage in self.stages],
            live=[len(stage.saved) for stage in self.stages],
            peak=[stage.peak for stage in self.stages],
            weights=[stage.weights() for stage in self.stages],
        )

    def _behind(self, stage: int) -> int:
        """d: how many micro-batches a stage runs ahead of its own backwards."""
        last = len(self.stages) - 1
        extra = math.ceil(self.job.extra_in_flight * (last - stage) / last) if last else 0
        return last - stage + extra

    def _drain(self) -> None:
        while any(stage.saved for stage in self.stages):
            self._rounds([None])
        self._round = 0

    def _rounds(self, batches: list[Any]) -> list[list[float]]:
        """One round per element, a new micro-batch or None.  Losses of the backwards done in them, by stage."""
        finished: list[list[float]] = [[] for _ in self.stages]
        for batch in batches:
            passed = batch
            for number, stage in enumerate(self.stages):
                if batch is not None:
                    passed = stage.forward(self._round, passed, batch[1])
                due = self._round - self._behind(number)
                if due in stage.saved:
                    after = self.stages[number + 1] if number + 1 < len(self.stages) else None
                    finished[number].append(stage.backward(due, after, self._accumulation))
                    if len(stage.window) == self._accumulation:
                        stage.step()
            self._round += 1
        return finished

    def _evaluate(self) -> float:
        losses = []
        for index in range(self._accumulation):
            passed, labels = jobs.micro_batch(self.job.model, jobs.EVALUATION_DATA + index)
            with torch.no_grad():
                for stage in self.stages:
                    passed = stage.module(passed)
                losses.append(jobs.loss(passed, labels).item())
        return math.fsum(losses) / len(losses)


class _Stage:
    """One stage: its layers, what its forwards saved, what its backwards made, and its own optimizer.

    Attributes:
        module: the layers.
        version: updates applied.
        saved: micro-batch -> what its backward needs.
        made: micro-batch -> (gradients of its input, its loss), for the stage before.
        window: losses of the micro-batches accumulated since the last update.
        windows: for every update, the mean loss of its micro-batches.
        drift: updates between forward and backward, for every micro-batch finished.
        peak: the most micro-batches that were saved at any time.
        factors: for every update of a stage that clips, clip / norm; below 1 it scaled the gradients.
    """

    def __init__(self, job: Job, stage: int, layers: list[nn.Module]) -> None:
        self._first_layer = job.stage_layers(stage).start
        self._is_first, self._is_last = stage == 0, stage == job.stages - 1
        self.module = nn.Sequential(*(layers[number] for number in job.stage_layers(stage)))
        self._updater = (_Updater if job.precision == "fp32" else _MasterUpdater)(job, self.module)
        self.version = 0
        self.saved: dict[int, _Saved] = {}
        self.made: dict[int, tuple[list[torch.Tensor], float]] = {}
        self.window: list[float] = []
        self.windows: list[float] = []
        self.drift: list[int] = []
        self.peak = 0

    @property
    def factors(self) -> list[float]:
        return self._updater.factors

    def forward(self, index: int, batch: Any, labels: Any) -> Any:
        """Run micro-batch `index` through the layers; what the next stage gets, or None at the last stage.

        `batch` is what the stage before has put out; at the first stage, the inputs and labels of the micro-batch.
        """
        inputs = batch[0] if self._is_first else _cut(batch)
        output = self.module(inputs)
        if self._is_last:
            output = jobs.loss(output, labels)
        self.saved[index] = _Saved(_floating(inputs), _floating(output), self.version)
        self.peak = max(self.peak, len(self.saved))
        return output

    def backward(self, index: int, after: _Stage | None, accumulation: int) -> float:
        """Finish micro-batch `index`: gradients into the accumulator and for the stage before.  Returns its loss."""
        saved = self.saved.pop(index)
        if after is None:
            loss, gradients = saved.outputs[0].item(), None
            torch.autograd.backward(saved.outputs[0] / accumulation)
        else:
            gradients, loss = after.made.pop(index)
            if any(output.requires_grad for output in saved.outputs):
                torch.autograd.backward(saved.outputs, gradients)
        self._updater.accumulate()
        if not self._is_first:
            self.made[index] = [leaf.grad for leaf in saved.inputs], loss
        self.drift.append(self.version - saved.version)
        self.window.append(loss)
        return loss

    def step(self) -> None:
        """Apply the accumulated gradients."""
        self._updater.step()
        self.version += 1
        self.windows.append(math.fsum(self.window) / len(self.window))
        self.window.clear()

    def rate(self) -> float:
        """The learning rate of the next update; NaN where nothing is trained."""
        return self._updater.optimizer.param_groups[0]["lr"] if self._updater.optimizer else math.nan

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the parameters, by layer number and name."""
        named = {}
        for number, layer in enumerate(self.module, self._first_layer):
            named.update((f"{number}.{name}", value.detach().clone()) for name, value in layer.named_parameters())
        return named


@dataclass
class _Saved:
    """What the forward of a micro-batch left for its backward."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    version: int


class _Updater:
    """fp32: gradients pile up in `.grad`; the optimizer steps the parameters under graphs that still hold them."""

    def __init__(self, job: Job, module: nn.Module) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.clip = job.clip
        self.factors: list[float] = []
        self.optimizer, self.schedule = None, None
        if self.parameters:
            self.optimizer = jobs.optimizer(job)(self.groups(job))
            self.schedule = jobs.schedule(job)(self.optimizer) if job.warmup else None

    def groups(self, job: Job) -> list[dict[str, Any]]:
        """The parameter groups that the optimizer steps."""
        return jobs.parameter_groups(job, self.parameters)

    def accumulate(self) -> None:
        """Take in what one backward has left in `.grad`."""

    def step(self) -> None:
        """Clip, update, move on with the learning rate, and forget the gradients."""
        if not self.optimizer:
            return
        self.reduce()
        self.shrink()
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.parameters)):
            self.update()
        if self.schedule:
            self.schedule.step()

    def reduce(self) -> None:
        """Exchange the accumulated gradients with the replicas of the stage: there are none."""

    def shrink(self) -> None:
        """Scale the gradients by min(1, clip / (norm + 1e-6)), the norm over all parameters of the stage."""
        gradients = self.gradients()
        if self.clip and gradients:
            norms = torch.stack([gradient.float().norm(2.0) for gradient in gradients])
            factor = self.factor(norms.pow(2.0).sum().pow(0.5) + 1e-6)
            self.factors.append(factor.item())
            if factor < 1:
                for gradient in gradients:
                    gradient.mul_(factor)

    def factor(self, norm: torch.Tensor) -> torch.Tensor:
        """clip / norm, as DeepSpeed divides it for fp32 gradients: one fp32 number by another."""
        return torch.tensor(self.clip) / norm

    def gradients(self) -> list[torch.Tensor]:
        """The accumulated gradients, those tensors themselves."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def update(self) -> None:
        """One step of the optimizer."""
        self.optimizer.step()
        self.optimizer.zero_grad()


class _MasterUpdater(_Updater):
    """Parameters over fp32 master weights, one flat tensor per group, of even length, as DeepSpeed keeps them.

    Gradients of each micro-batch come in bf16 and are added up in fp32 or bf16; under ZeRO in fp32, both are fp32.  The
    sum goes over the wire between replicas in `communication_data_type`, the parameters' dtype unless the config says
    otherwise, and is rounded to it even where there is but one replica.
    """

    def __init__(self, job: Job, module: nn.Module) -> None:
        if job.precision != "fp32":
            module.bfloat16()
        self._sum_dtype = {"fp32": torch.float32, "bf16": torch.float32, "bf16-bf16": torch.bfloat16}[job.precision]
        self._wire_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[
            job.config.get("communication_data_type", job.precision[:4])
        ]
        self._flat: list[tuple[list[nn.Parameter], torch.Tensor, torch.Tensor]] = []
        super().__init__(job, module)

    def groups(self, job: Job) -> list[dict[str, Any]]:
        groups = jobs.parameter_groups(job, self.parameters)
        for group in groups:
            pieces = [parameter.detach().flatten() for parameter in group["params"]]
            if sum(piece.numel() for piece in pieces) % 2:
                pieces.append(torch.zeros(1, dtype=pieces[0].dtype))
            master = torch.cat(pieces).float().requires_grad_()
            self._flat.append((group["params"], master, torch.zeros_like(master, dtype=self._sum_dtype)))
            group["params"] = [master]
        return groups

    def _pieces(self, parameters: list[nn.Parameter], flat: torch.Tensor) -> list[torch.Tensor]:
        sizes = [parameter.numel() for parameter in parameters]
        return list(flat[: sum(sizes)].split(sizes))

    def accumulate(self) -> None:
        for parameters, _, total in self._flat:
            for parameter, piece in zip(parameters, self._pieces(parameters, total), strict=True):
                if parameter.grad is not None:
                    piece.add_(parameter.grad.flatten().to(self._sum_dtype))
                    parameter.grad = None

    def reduce(self) -> None:
        for _, _, total in self._flat:
            total.copy_(total.to(self._wire_dtype))

    def factor(self, norm: torch.Tensor) -> torch.Tensor:
        return self.clip / norm  # in PyTorch the reciprocal of the norm, times a Python number

    def gradients(self) -> list[torch.Tensor]:
        return [piece for parameters, _, total in self._flat for piece in self._pieces(parameters, total)]

    def update(self) -> None:
        for _, master, total in self._flat:
            master.grad = total.float()
        self.optimizer.step()
        for parameters, master, total in self._flat:
            for parameter, piece in zip(parameters, self._pieces(parameters, master.detach()), strict=True):
                parameter.data.copy_(piece.view_as(parameter))
            total.zero_()


def _tensors(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def _floating(value: Any) -> list[torch.Tensor]:
    return [tensor for tensor in _tensors(value) if tensor.is_floating_point()]


def _cut(value: Any) -> Any:
    """The same tensors, outside the graph that made them; the floating ones want a gradient."""
    leaves = [tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in _tensors(value)]
    return tuple(leaves) if isinstance(value, tuple) else leaves[0]

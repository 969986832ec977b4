"""The stage runner on CUDA streams: all stages in one process, a thread and a compute stream each, a stream a link.

The links here behave as NCCL's do (a send and its receive start when the device has come to them, and `receive` orders
the stage's stream behind the message without a wait of the host), and every transfer begins with a random sleep on the
device.  The weights must equal those of the same schedule run op by op on one stream, bit for bit: a missing order
between two streams shows as a difference.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.place import Failed, Place
from paci_schedule.core.ops import Op
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.rehearse import rehearse
from paci_schedule.runtime.ranges import Ranges
from paci_schedule.runtime.stage import StageRunner
from paci_schedule.runtime.stopwatch import Stopwatch

__all__ = ["run"]

_PATIENCE = 60.0  # seconds
_LONGEST_SLEEP = 2_000_000  # clock cycles, about a millisecond


def run(place: Place) -> dict[str, Any]:
    """The largest difference of any weight, for several shapes and seeds; raises unless it is 0."""
    width, seeds = (16, 1) if place.dry else (1024, 4)
    figures = {}
    for stages, accumulation, slack in ((2, 1, 0), (4, 3, 0), (4, 8, 0), (3, 2, 3)):
        spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=slack)
        for seed in range(seeds):
            difference = _difference(spec, width, seed, place.device)
            figures[f"P={stages} a={accumulation} slack={slack} seed={seed}"] = difference
    wrong = [name for name, difference in figures.items() if difference]
    if wrong:
        raise Failed(f"streams ran out of order: weights differ in {wrong}", figures)
    return figures


def _difference(spec: PipelineSpec, width: int, seed: int, device: torch.device) -> float:
    updates = 3
    batches = [
        [_micro_batch(spec.accumulation * update + index, width, device) for index in range(spec.accumulation)]
        for update in range(updates)
    ]
    expected = _stages(spec, width, device)
    for _ in rehearse(
        expected,
        [_optimizer(stage) for stage in expected],
        nn.functional.mse_loss,
        batches,
        schedule="paci",
        accumulation=spec.accumulation,
        extra_in_flight=spec.extra_in_flight,
    ):
        pass
    stages = _stages(spec, width, device)
    _run_in_threads(spec, stages, batches, seed, device)
    return max(
        (mine - theirs).abs().max().item()
        for stage, other in zip(stages, expected, strict=True)
        for mine, theirs in zip(stage.parameters(), other.parameters(), strict=True)
    )


def _micro_batch(index: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return tuple(torch.randn(32, width, generator=generator).to(device) for _ in range(2))


def _stages(spec: PipelineSpec, width: int, device: torch.device) -> list[nn.Module]:
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh()).to(device) for _ in range(spec.stages)]


def _optimizer(stage: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(stage.parameters(), lr=0.5, momentum=0.9)


def _run_in_threads(
    spec: PipelineSpec, stages: list[nn.Module], batches: list[list[Any]], seed: int, device: torch.device
) -> None:
    wires = {name: [queue.Queue() for _ in range(spec.stages - 1)] for name in ("activation", "gradient")}
    failures: list[BaseException] = []

    def work(stage: int) -> None:
        try:
            with _stream(device):
                compute = _Compute(stages[stage], [pair for batch in batches for pair in batch], spec, stage)
                links = _Links(stage, wires, device, random.Random(1000 * seed + stage))
                runner = StageRunner(
                    spec, stage, compute, links, Stopwatch(device), schedule=schedule("paci"), ranges=Ranges(device)
                )
                for _ in batches:
                    runner.train_batch()
                runner.drain()
                if device.type == "cuda":
                    torch.cuda.current_stream().synchronize()
        except BaseException as error:
            failures.append(error)

    if device.type == "cuda":
        torch.cuda.synchronize()  # what the default stream has prepared
    threads = [threading.Thread(target=work, args=(stage,), daemon=True) for stage in range(spec.stages)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE)
    if failures:
        raise failures[0]
    if any(thread.is_alive() for thread in threads):
        raise AssertionError(f"the stages did not finish within {_PATIENCE:g} s")


def _stream(device: torch.device) -> Any:
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext()


class _Compute:
    """A stage of plain modules (runtime.stage.StageCompute)."""

    def __init__(self, module: nn.Module, data: list[Any], spec: PipelineSpec, stage: int) -> None:
        self._module, self._data, self._spec = module, data, spec
        self._first, self._last = stage == 0, stage == spec.stages - 1
        self._optimizer = _optimizer(module)
        self._live: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, micro_batch: int, inputs: torch.Tensor | None) -> torch.Tensor | None:
        if self._first:
            inputs = self._data[micro_batch][0]
        else:
            inputs.requires_grad_()
        outputs = self._module(inputs)
        if self._last:
            outputs = nn.functional.mse_loss(outputs, self._data[micro_batch][1])
        self._live[micro_batch] = inputs, outputs
        return None if self._last else outputs.detach()

    def backward(self, micro_batch: int, gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        inputs, outputs = self._live.pop(micro_batch)
        if self._last:
            self._loss = outputs.detach().reshape(1)
            (outputs / self._spec.accumulation).backward()
        else:
            outputs.backward(gradients[0])
        return () if self._first else (inputs.grad,)

    def losses(self, micro_batch: int) -> torch.Tensor:
        return self._loss

    def step(self, update: int, losses: torch.Tensor) -> None:
        with torch.autograd._unsafe_preserve_version_counter(tuple(self._module.parameters())):
            self._optimizer.step()
        self._optimizer.zero_grad()


class _Links:
    """The links of one stage (runtime.links.Links) within a process: messages are copied on a stream for each link."""

    def __init__(
        self, stage: int, wires: dict[str, list[queue.Queue]], device: torch.device, chance: random.Random
    ) -> None:
        self._on_gpu, self._chance = device.type == "cuda", chance
        self._in, self._out = {}, {}
        above, below = stage - 1, stage  # the links to the stages before and after this one
        for content, comes_by, goes_by in (("activation", above, below), ("gradient", below, above)):
            for ends, link in ((self._in, comes_by), (self._out, goes_by)):
                if 0 <= link < len(wires[content]):
                    ends[content] = wires[content][link]
        self._streams = {name: torch.cuda.Stream() if self._on_gpu else None for name in ("activation", "gradient")}
        self._posted: dict[str, list[Any]] = {"activation": [], "gradient": []}

    def limit_gradients(self, on_wire: int) -> None:
        """Every message is copied at once, so nothing waits for an earlier one."""

    def _mark(self) -> Any:
        return torch.cuda.current_stream().record_event() if self._on_gpu else None

    def _expect(self, content: str) -> None:
        self._posted[content].append(self._mark())

    def _send(self, content: str, payload: Any, riders: tuple[torch.Tensor, ...]) -> None:
        self._out[content].put((payload, riders, self._mark()))

    def _receive(self, content: str) -> tuple[Any, tuple[torch.Tensor, ...]]:
        payload, riders, sent = self._in[content].get(timeout=_PATIENCE)
        posted = self._posted[content].pop(0)
        is_tuple = isinstance(payload, tuple)
        tensors = [*(payload if is_tuple else (payload,)), *riders]
        receiver = torch.cuda.current_stream() if self._on_gpu else None
        with torch.cuda.stream(self._streams[content]) if self._on_gpu else contextlib.nullcontext():
            arrived = [torch.empty_like(tensor) for tensor in tensors]
            if self._on_gpu:
                for event in (sent, posted):
                    torch.cuda.current_stream().wait_event(event)
                torch.cuda._sleep(self._chance.randrange(_LONGEST_SLEEP))
            for target, tensor in zip(arrived, tensors, strict=True):
                target.copy_(tensor)
                if self._on_gpu:
                    tensor.record_stream(self._streams[content])
                    target.record_stream(receiver)
            done = self._mark()
        if self._on_gpu:
            torch.cuda.current_stream().wait_event(done)
        split = len(tensors) - len(riders)
        return tuple(arrived[:split]) if is_tuple else arrived[0], tuple(arrived[split:])

    def expect_activation(self, op: Op) -> None:
        self._expect("activation")

    def expect_gradient(self, op: Op) -> None:
        self._expect("gradient")

    def send_activation(self, op: Op, payload: Any, riders: tuple[torch.Tensor, ...]) -> None:
        self._send("activation", payload, riders)

    def send_gradient(self, op: Op, payload: Any, riders: tuple[torch.Tensor, ...]) -> None:
        self._send("gradient", payload, riders)

    def recv_activation(self, op: Op) -> tuple[Any, tuple[torch.Tensor, ...]]:
        return self._receive("activation")

    def recv_gradient(self, op: Op) -> tuple[Any, tuple[torch.Tensor, ...]]:
        return self._receive("gradient")

    def finish(self) -> None:
        """Nothing is left on the way: a message is taken where it is sent."""

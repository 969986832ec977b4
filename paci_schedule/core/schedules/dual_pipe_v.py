"""DualPipeV: two chunks a stage, folded like a V; a forward of one chunk and a backward of the other run side by side.

Source: DeepSeek-V3 (arXiv 2412.19437, section 3.2.1) with its two directions cut into one, as DualPipe's README and
"DualPipe could be better without the Dual" (Sea AI Lab) describe it.  Only the backwards at the ends of a batch are
split.  P = 2, M = 4, F, B and W of a chunk of the same length (.1 is chunk 1, `|` the step; a B with its W behind it is
one backward, unless its stage had it split):

    stage 0   F0   F1   F2   F0.1 B0.1 W0.1 F1.1 F3   B1.1 W1.1 F2.1 B0   W0   B2.1 W2.1 F3.1 B1   W1   B3.1 W3.1 ...
    stage 1   .    F0   F0.1 F1   F1.1 F2   B0.1 W0.1 F2.1 B0   W0   F3   B1.1 W1.1 F3.1 B1   W1   B2.1 W2.1 B2   ...

In hardware the all-to-all of one op hides behind the computing of the other; here the two run one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.base import Schedule, weave
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError

__all__ = ["DualPipeV"]

_Step = tuple[OpKind, int]


class DualPipeV(Schedule):
    """DualPipeV, to be drawn and simulated."""

    name = "dualpipev"
    chunks = 2
    splits_backward = True
    planned = False
    cannot_run = "cuts the model into two chunks a stage; an engine holds one"

    def check(self, spec: PipelineSpec) -> None:
        super().check(spec)
        if spec.accumulation < 2 * spec.stages:
            raise ConfigError(
                f"accumulation={spec.accumulation}: {self.name} needs at least two micro-batches a stage; use "
                f"{2 * spec.stages} or more"
            )

    def batch(self, spec: PipelineSpec, stage: int) -> Iterator[Op]:
        return weave(self._pattern(spec, stage), spec.accumulation)

    def _pattern(self, spec: PipelineSpec, stage: int) -> Iterator[_Step]:
        to_turn, held = spec.stages - stage - 1, list[_Step]()  # held: weight gradients that wait

        def forward(chunk: int) -> Iterator[_Step]:
            yield OpKind.FORWARD, chunk

        def backward(chunk: int, split: bool = False) -> Iterator[_Step]:
            yield OpKind.BACKWARD, chunk
            if split:
                held.append((OpKind.WEIGHT, chunk))
            else:
                yield OpKind.WEIGHT, chunk

        for _ in range(2 * to_turn):
            yield from forward(0)
        for _ in range(stage + 1):
            yield from (*forward(0), *forward(1))
        for _ in range(to_turn):
            yield from backward(1, split=True)
            yield from (held.pop(0), *forward(1))
        for _ in range(spec.accumulation - 2 * spec.stages + stage + 1):
            yield from (*forward(0), *backward(1), *forward(1), *backward(0))
        for _ in range(to_turn):
            yield from (*backward(1), *forward(1), *backward(0))
        for number in range(2 * (stage + 1)):  # the second half of these is split
            yield from backward(1 - number % 2, split=number > stage)
        for _ in range(to_turn):
            yield held.pop(0)
            yield from backward(0, split=True)
        yield from held

    def position(self, stages: int, stage: int, chunk: int) -> int:
        return 2 * stages - 1 - stage if chunk else stage

    def in_flight(self, spec: PipelineSpec, stage: int) -> int:
        return 2 * spec.stages + 1

"""Interleaved 1F1B: v model chunks a stage, so that the pipe fills with chunks instead of whole stages.

Source: arXiv 2104.04473, section 2.2.  Chunk c of stage s is piece c P + s of the model; micro-batches go through in
groups of P, each group through chunk 0 of every stage, then chunk 1, and so on.  P = 2, v = 2, M = 4, F and B of a
chunk have the same length (.1 is chunk 1, `|` the step):

    stage 0   F0   F1   F0.1 F1.1 F2   B0.1 F3   B1.1 F2.1 B0   F3.1 B1   .    B2.1 .    B3.1 B2   B3  |
    stage 1   .    F0   F1   F0.1 B0.1 F1.1 B1.1 F2   B0   F3   B1   F2.1 B2.1 F3.1 B3.1 B2   B3  |

The bubble of a batch is (P-1)(F+B)/v, where F and B are those of a whole stage.  The first stage holds up to
P + (P-1)/v micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError

__all__ = ["Interleaved"]


class Interleaved(Schedule):
    """Interleaved 1F1B with `chunks` model chunks a stage."""

    name = "interleaved-1f1b"
    options = frozenset({"chunks"})
    cannot_run = "cuts the model into several chunks a stage; an engine holds one"

    def __init__(self, chunks: int = 2) -> None:
        if chunks < 2:
            raise ConfigError(f"chunks={chunks}: {self.name} needs at least 2 model chunks a stage; take 1f1b for one")
        self.chunks = chunks

    def check(self, spec: PipelineSpec) -> None:
        super().check(spec)
        if spec.accumulation % spec.stages:
            raise ConfigError(
                f"accumulation={spec.accumulation}: {self.name} takes micro-batches in groups of one a stage; "
                f"use a multiple of the {spec.stages} stages"
            )

    def batch(self, spec: PipelineSpec, stage: int) -> Iterator[Op]:
        total, ahead = self.chunks * spec.accumulation, self._ahead(spec, stage)
        forwards = (Op(OpKind.FORWARD, *self._turn(spec, turn)) for turn in range(total))
        backwards = (
            Op(OpKind.BACKWARD, index, self.chunks - 1 - chunk)
            for index, chunk in (self._turn(spec, turn) for turn in range(total))
        )
        for _ in range(ahead):
            yield next(forwards)
        for forward, backward in zip(forwards, backwards, strict=False):
            yield from (forward, backward)
        yield from backwards

    def in_flight(self, spec: PipelineSpec, stage: int) -> int:
        return min(self._ahead(spec, stage) + 1, self.chunks * spec.accumulation)

    def _ahead(self, spec: PipelineSpec, stage: int) -> int:
        """Chunk forwards before the first backward."""
        ahead = 2 * (spec.stages - 1 - stage) + (self.chunks - 1) * spec.stages
        return min(ahead, self.chunks * spec.accumulation)

    def _turn(self, spec: PipelineSpec, turn: int) -> tuple[int, int]:
        """The micro-batch and the chunk of a stage's `turn`-th forward."""
        group, place = divmod(turn, spec.stages * self.chunks)
        return group * spec.stages + place % spec.stages, place // spec.stages

"""What a schedule is: a name, the ops of every stage, and the limits that it promises to keep.

A schedule splits the model into `chunks` pieces for each stage.  In the order in which an activation passes them, the
pieces have the *positions* 0 to stages * chunks - 1; `position` gives the position of a stage's chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple, Protocol

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError

__all__ = ["Batch", "Call", "Rounds", "Schedule", "weave"]


class Call(Protocol):
    """What one call of a training loop executes."""

    @property
    def taken(self) -> int:
        """Micro-batches that the pipe has taken in at the end of the call, counted since it was last empty."""
        ...

    @property
    def finished(self) -> int:
        """Micro-batches of which every stage has done the backward by then; `taken` if the pipe is empty again."""
        ...

    def ops(self, stage: int) -> Iterable[Op]:
        """The compute ops of `stage`, in order."""
        ...


class Rounds(Call, Protocol):
    """A call of a schedule that runs in rounds."""

    @property
    def spec(self) -> PipelineSpec:
        """The pipeline."""
        ...

    @property
    def leading(self) -> bool:
        """True where the call ends for every stage after the same B, not after the same F."""
        ...

    def rounds(self, stage: int) -> range:
        """The rounds that `stage` executes: round i is F(i), then B(i - d), where these exist."""
        ...


class Batch(NamedTuple):
    """The call of a schedule that flushes: one batch from an empty pipe to an empty pipe."""

    schedule: Schedule
    spec: PipelineSpec

    @property
    def taken(self) -> int:
        return self.spec.accumulation

    finished = taken

    def ops(self, stage: int) -> Iterable[Op]:
        return (*self.schedule.batch(self.spec, stage), Op(OpKind.STEP, 0))


class Nothing:
    """The call that drains a pipe which is empty already."""

    taken = finished = 0

    def ops(self, stage: int) -> Iterable[Op]:
        return ()


class Schedule:
    """A pipeline schedule; a subclass says where it differs from a flush, one chunk and an unsplit backward.

    Attributes:
        name: the name in the registry.
        chunks: model chunks of each stage.
        splits_backward: True where the weight gradient is an op of its own (W) and B the input gradient only.
        flushes: True where every batch begins and ends with an empty pipe.
        in_rounds: True where round i of a stage is F(i), then B(i - d), without end, with d the look-ahead of
            `PipelineSpec`: the closed forms of `core.drift` hold, and there are wavefronts (`simulate.wavefront`).
        options: the options that it takes: "chunks", "leading", "extra_in_flight", "prediction".
        cannot_run: why no engine can run it; empty where engines can.
        planned: whether the planner searches it unasked; else it is there to be drawn and simulated.
    """

    name: str
    chunks: int = 1
    splits_backward: bool = False
    flushes: bool = True
    in_rounds: bool = False
    options: frozenset[str] = frozenset()
    cannot_run: str = ""
    planned: bool = True

    def check(self, spec: PipelineSpec) -> None:
        """Raises ConfigError where the schedule does not exist for `spec`."""
        if spec.extra_in_flight and "extra_in_flight" not in self.options:
            raise ConfigError(
                f"extra_in_flight={spec.extra_in_flight}: {self.name} has a fixed number of micro-batches in "
                "flight; leave it at 0, or take the paci schedule"
            )

    def call(self, spec: PipelineSpec, taken: int = 0, finished: int = 0, last: int | None = None) -> Call:
        """What the next call of a training loop executes.

        Args:
            spec: the pipeline.
            taken: micro-batches that the pipe has taken in since it was last empty.
            finished: micro-batches of which every stage has done the backward since then.
            last: micro-batches, counted likewise, after which the pipe is to be empty; for a schedule whose calls may
                read ahead.
        """
        return Batch(self, spec)

    def drain(self, spec: PipelineSpec, taken: int) -> Call:
        """What finishes the backwards that are outstanding after `taken` micro-batches."""
        return Nothing()

    def run(self, spec: PipelineSpec, batches: int) -> Iterator[Call]:
        """The calls of a run of `batches` batches, from an empty pipe to an empty pipe."""
        return (self.call(spec) for _ in range(batches))

    def batch(self, spec: PipelineSpec, stage: int) -> Iterator[Op]:
        """The ops of `stage` for one batch from an empty pipe to an empty pipe, its STEP left out."""
        raise NotImplementedError

    def calls(self, spec: PipelineSpec, stage: int, batches: int) -> Iterator[Iterable[Op]]:
        """The ops of `stage`, grouped by the calls of a training loop; equally many calls on every stage.

        Micro-batches and updates count on from call to call.
        """
        for number in range(batches):
            first = number * spec.accumulation
            ops = [op._replace(index=op.index + first) for op in self.batch(spec, stage)]
            yield [*ops, Op(OpKind.STEP, number)]

    def stream(self, spec: PipelineSpec, stage: int, batches: int) -> Iterator[Op]:
        """The ops of `stage` for `batches` batches, from an empty pipe to an empty pipe."""
        return chain.from_iterable(self.calls(spec, stage, batches))

    def position(self, stages: int, stage: int, chunk: int) -> int:
        """The position of a chunk in the order in which an activation passes all of them."""
        return chunk * stages + stage

    def in_flight(self, spec: PipelineSpec, stage: int) -> int:
        """The most chunks' worth of activations that `stage` holds at any time, from F to the end of its backward."""
        raise NotImplementedError

    def micro_batches_per_update(self, spec: PipelineSpec) -> int:
        """The number of backwards between two updates of a stage."""
        return spec.accumulation

    def gradients_on_wire(self, spec: PipelineSpec, stage: int) -> int:
        """How many gradients `stage` may be sending to the stage before it at once."""
        return min(stage, 1)

    def drift(self, spec: PipelineSpec, stage: int, micro_batch: int) -> int:
        """Updates between the F and the B of this micro-batch at `stage`."""
        return 0

    def drift_bound(self, spec: PipelineSpec, stage: int) -> int:
        """The most updates between the F and the B of a micro-batch at `stage`."""
        return 0

    def weight_versions(self, spec: PipelineSpec, stage: int) -> int:
        """How many versions of its weights `stage` keeps: 1 without a stash."""
        return 1


def weave(pattern: Iterable[tuple[OpKind, int]], micro_batches: int) -> Iterator[Op]:
    """Number a pattern of (kind, chunk): the n-th F of a chunk is F(n), and so on; the rest is left out."""
    done: Counter[tuple[OpKind, int]] = Counter()
    for kind, chunk in pattern:
        index = done[kind, chunk]
        done[kind, chunk] += 1
        if index < micro_batches:
            yield Op(kind, index, chunk)

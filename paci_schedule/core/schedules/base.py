"""What a schedule is: a name, the ops of every stage, and the limits it promises to keep.

A schedule splits the model into `chunks` pieces a stage.  The pieces stand in a row of stages * chunks *positions*, the
way an activation travels; `position` says where a stage's chunk stands in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from paci_schedule.core.ops import Op, OpKind
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError

__all__ = ["Schedule", "weave"]


class Schedule:
    """A pipeline schedule; subclasses say what differs from plain, flushed, unsplit pipelines.

    Attributes:
        name: how it is asked for.
        chunks: model chunks a stage.
        splits_backward: True where the weight gradient is an op of its own (W) and B the input gradient only.
        flushes: True where every batch begins and ends with an empty pipe.
        takes_extra: True where `PipelineSpec.extra_in_flight` may be more than 0.
    """

    name: str
    chunks: int = 1
    splits_backward: bool = False
    flushes: bool = True
    takes_extra: bool = False

    def check(self, spec: PipelineSpec) -> None:
        """Raises ConfigError where the schedule does not exist for `spec`."""
        if spec.extra_in_flight and not self.takes_extra:
            raise ConfigError(
                f"extra_in_flight={spec.extra_in_flight}: {self.name} has a fixed number of micro-batches in "
                "flight; leave it at 0, or take the paci schedule"
            )

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
        """Where the chunk stands in the row of stages * chunks that an activation travels."""
        return chunk * stages + stage

    def in_flight(self, spec: PipelineSpec, stage: int) -> int:
        """The most chunks' worth of activations that `stage` holds at any time, from F to the end of its backward."""
        raise NotImplementedError

    def micro_batches_per_update(self, spec: PipelineSpec) -> int:
        """After how many backwards a stage steps."""
        return spec.accumulation

    def drift_bound(self, spec: PipelineSpec, stage: int) -> int:
        """The most updates between the F and the B of a micro-batch at `stage`."""
        return 0

    def weight_versions(self, spec: PipelineSpec, stage: int) -> int:
        """How many versions of its weights `stage` keeps: 1 without a stash."""
        return 1


def weave(pattern: Iterable[tuple[OpKind, int]], micro_batches: int) -> Iterator[Op]:
    """Number a pattern of (kind, chunk): its n-th F of a chunk is F(n), and so on; those beyond the batch fall away."""
    done: Counter[tuple[OpKind, int]] = Counter()
    for kind, chunk in pattern:
        index = done[kind, chunk]
        done[kind, chunk] += 1
        if index < micro_batches:
            yield Op(kind, index, chunk)

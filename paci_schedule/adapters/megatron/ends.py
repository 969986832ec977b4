"""When the pipe shall be empty: at the end of training, where the run is saved or may exit, where a batch changes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from megatron.core import num_microbatches_calculator

from paci_schedule.adapters.megatron.exits import UnplannedEnd
from paci_schedule.adapters.megatron.job import Job
from paci_schedule.adapters.megatron.options import PaciOptions
from paci_schedule.core.spec import PipelineSpec

__all__ = ["JobEnds", "PlannedEnds"]


@dataclass(frozen=True)
class PlannedEnds:
    """Iterations known beforehand, after which no micro-batch shall be parked.

    Attributes:
        moments: iterations.
        intervals: every so many iterations.
    """

    moments: tuple[int, ...] = ()
    intervals: tuple[int, ...] = ()

    @classmethod
    def of_options(cls, options: PaciOptions) -> PlannedEnds:
        """The ends of a training loop that the user wrote; its calls are counted from the first one under PACI."""
        return cls(_known(options.train_iters), _known(options.drain_interval))

    @classmethod
    def of_job(cls, args: Any) -> PlannedEnds:
        """The ends of a job with these arguments of Megatron-LM."""
        saves = (args.save_interval, getattr(args, "non_persistent_save_interval", None)) if args.save else ()
        phases = getattr(args, "phase_transition_iterations", None) or ()
        # What is skipped must not have been read ahead.  Megatron-LM's versions do not count the iterations alike.
        skipped = [done for number in getattr(args, "iterations_to_skip", None) or () for done in (number - 1, number)]
        return cls(_known(args.train_iters, *phases, *skipped), _known(args.exit_interval, *saves))

    def next_end(self, iteration: int, spec: PipelineSpec | None = None) -> int | None:
        """The first such iteration after `iteration` are done; None where none is known."""
        ends = [moment for moment in self.moments if moment > iteration]
        ends += [(iteration // interval + 1) * interval for interval in self.intervals]
        return min(ends, default=None)


class JobEnds:
    """The ends of a job, those among them that are decided while it runs.

    Args:
        job: which trains.
    """

    def __init__(self, job: Job) -> None:
        self._args, self._planned = (args := job.args), PlannedEnds.of_job(args)
        may_end = args.exit_signal_handler or args.exit_duration_in_mins
        self._unplanned = UnplannedEnd(job) if may_end else None

    def next_end(self, iteration: int, spec: PipelineSpec) -> int | None:
        """As that of `PlannedEnds`; asked before every iteration."""
        ends = [self._planned.next_end(iteration), self._next_batch_size(iteration, spec)]
        if self._unplanned is not None:
            ends.append(self._unplanned.after(iteration, spec))
        return min((end for end in ends if end is not None), default=None)

    def _next_batch_size(self, iteration: int, spec: PipelineSpec) -> int | None:
        """The iteration after which an update has another number of micro-batches, if it is so near that the first
        stage may read beyond it in the iteration that comes."""
        calculator: Any = copy.copy(num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR)
        if calculator is None:
            return None
        consumed, accumulation = self._args.consumed_train_samples, calculator.get()
        for end in range(iteration + 1, iteration + 2 + spec.look_ahead(0) // spec.accumulation):
            consumed += calculator.get_current_running_global_batch_size()
            calculator.update(consumed, False)
            if calculator.get() != accumulation:
                return end
        return None


def _known(*numbers: int | None) -> tuple[int, ...]:
    return tuple(number for number in numbers if number)

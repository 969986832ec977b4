"""When the pipe shall be empty: at the end of training, and where the run is saved or may exit."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from paci_schedule.adapters.megatron.options import PaciOptions

__all__ = ["PlannedEnds"]


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
    def of_job(cls, args: Namespace) -> PlannedEnds:
        """The ends of a Megatron-LM job."""
        saves = (args.save_interval, getattr(args, "non_persistent_save_interval", None)) if args.save else ()
        phases = getattr(args, "phase_transition_iterations", None) or ()
        return cls(_known(args.train_iters, *phases), _known(args.exit_interval, *saves))

    def next_end(self, iteration: int) -> int | None:
        """The first such iteration after `iteration` are done; None where none is known."""
        ends = [moment for moment in self.moments if moment > iteration]
        ends += [(iteration // interval + 1) * interval for interval in self.intervals]
        return min(ends, default=None)


def _known(*numbers: int | None) -> tuple[int, ...]:
    return tuple(number for number in numbers if number)

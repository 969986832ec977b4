"""A training loop that somebody else wrote, as the schedule sees it: its settings, its iterations, its sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paci_schedule.adapters.megatron import groups
from paci_schedule.adapters.megatron.stage_local import chains, optimizers
from paci_schedule.runtime.deferred.reports import CarriedReports
from paci_schedule.runtime.meeting import Meetings

__all__ = ["Deferred", "Job", "as_it_is"]

Deferred = Callable[[], Callable[[Path], None]]
"""Takes what a stage has deferred now, with an empty pipe; returns what writes it into a folder."""

_METRICS = 8  # that a mixture of experts reports of every layer, at most


class Job(ABC):
    """A job with a training loop of Megatron-LM, of Megatron-Bridge or of ms-swift.

    Attributes:
        args: its settings and what it has done, by the names of Megatron-LM's arguments; they can be set.
    """

    def __init__(self, args: Any) -> None:
        self.args = args

    @property
    @abstractmethod
    def iteration(self) -> int:
        """Iterations that the job has done, asked while it trains."""

    @property
    def finished(self) -> int:
        """The same, asked after the update of an iteration, where the job decides whether to end."""
        return self.iteration

    @property
    def started(self) -> float:
        """When it started to train, in seconds as of `time.time`; asked where its time is limited."""
        return 0.0

    @property
    def signal_handler(self) -> Any:
        """What hears the signal that ends the job, if it is to hear one."""
        return None

    @property
    def tokens(self) -> int | None:
        """Of a micro-batch; None where that is not always the same."""
        return self.args.seq_length * self.args.micro_batch_size

    @abstractmethod
    def reasons(self) -> Iterator[str]:
        """Why it cannot run under PACI."""

    def worded(self, reason: str) -> str:
        """A reason with the flags that users of this framework write; it is given with Megatron-LM's."""
        return reason

    @abstractmethod
    def keep_inside(self, carried: CarriedReports | None) -> None:
        """Let what the loop sums over all stages in every iteration be the stage's own, or come with the messages."""

    @abstractmethod
    def keep_deferred(self, deferred: Deferred, stage: int, meetings: Meetings, timeout: timedelta) -> None:
        """Let every checkpoint hold what is deferred.

        Args:
            deferred: asked at the beginning of a save.
            stage, timeout: as of `waiting`.
            meetings: of the job.
        """

    @abstractmethod
    def before_restart(self, let_go: Callable[[], None]) -> None:
        """Let it forget this model where it restarts in the same process: the next one needs its memory.

        Args:
            let_go: of the micro-batches in flight, whose graphs keep a model alive.
        """

    @abstractmethod
    def loaded(self) -> Path | None:
        """The folder of what was deferred in the checkpoint that the job began with; None where it began anew."""

    @abstractmethod
    def writers(self) -> tuple[Any, Any]:
        """Those of TensorBoard and W&B; None on ranks that have none."""

    def reports(self, device: torch.device) -> CarriedReports | None:
        """What carries the sums that the job's log line has of all stages; None where it has none."""
        args = self.args
        layers = (args.num_layers or 0) + (getattr(args, "mtp_num_layers", None) or 0)
        size = bool(args.log_params_norm) + (_METRICS * layers if args.num_experts else 0)
        return CarriedReports(size, device) if size else None

    def write_figures(self, figures: Callable[[], Sequence[Mapping[str, float] | None]]) -> None:
        """Write what is known of all stages to TensorBoard and W&B, on the rank where the job has such a writer.

        Args:
            figures: gives the newest figures of every stage; asked only on that rank.
        """
        if self.iteration % self.args.tensorboard_log_interval:
            return
        board, wandb = self.writers()
        if not (board or wandb):
            return
        told = {
            f"stage-{stage}/{name.replace('_', '-')}": value
            for stage, newest in enumerate(figures())
            for name, value in (newest or {}).items()
            if name != "loss"
        }
        for name, value in told.items() if board else ():
            board.add_scalar(name, value, self.iteration)
        if wandb and told:
            wandb.log(told, self.iteration)

    def make_local(self, config: Any, carried: CarriedReports | None) -> None:
        """Keep what the training loop does in every iteration inside the stage.

        * Success of the update, gradient norm and learning rate are reduced over all model-parallel ranks, though every
          rank of a stage agrees on them already: no reduction.
        * The timer of the log line waits for the whole world: now only for the stage's tensor-parallel ranks.  Other
          timers wait for nobody, and each rank reports its own times.
        * Sums over all stages in the log line are carried with the messages.
        """
        settings: Any
        for settings in (self.args, config, *(each.config for each in (*optimizers(config), *chains(config)))):
            settings.barrier_with_L1_time = False
        if config.timers is not None:
            config.timers("interval-time").set_barrier_group(groups.tensor_parallel())
            config.timers._get_elapsed_time_all_ranks = partial(_own_times, config.timers)
        self.keep_inside(carried)


def as_it_is(value: Any, *_: Any, **__: Any) -> Any:
    """Stands in for a reduction."""
    return value


def _own_times(timers: Any, names: list[str], reset: bool, barrier: bool) -> torch.Tensor | None:
    """Stands in for `Timers._get_elapsed_time_all_ranks`: float32[world, n] with the times of this rank alone.  A zero
    means to Megatron-core that a rank has no time to report."""
    if not names:
        return None
    times = torch.zeros(dist.get_world_size(), len(names))
    for place, name in enumerate(names):
        if name in timers._timers:
            times[dist.get_rank(), place] = timers._timers[name].elapsed(reset=reset)
    return times

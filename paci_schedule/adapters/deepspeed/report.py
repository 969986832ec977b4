"""What rank 0 reports of an update: the steps_per_print line and the monitor's events.

Rank 0 holds the first stage.  It learns the loss of a micro-batch when that micro-batch's gradient comes back, so it
reports an update when it has applied it: step, samples, loss, learning rate and drift all belong to the same update.
The numbers are written at the next update, when the device has long copied them, so that nobody waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from deepspeed.monitor.monitor import MonitorMaster

from paci_schedule.runtime.host_copy import HostCopy

__all__ = ["Reporter", "Update"]


@dataclass(frozen=True)
class Update:
    """One optimizer update of this stage.

    Attributes:
        step: updates applied, this one included.
        samples: samples that the job has trained on by then.
        losses: float32[n]: the mean loss over the update's micro-batches, and the additional losses.
        names: of the additional losses.
        drift: the largest of the update's micro-batches, in updates.
        seconds: that this stage has computed and waited since its construction.
        at: when the host took the update, in seconds of `time.perf_counter`.
    """

    step: int
    samples: int
    losses: HostCopy
    names: tuple[str, ...]
    drift: int
    seconds: tuple[float, float]
    at: float


class Reporter:
    """Reports updates, each when the stage takes its next one, or when the pipe is drained.

    Args:
        monitor: DeepSpeed's monitor.
        figures: gives the newest figures of all stages, by name; None for a stage that has told none.
        steps_per_print: updates between two printed lines; None for no lines.
        writes: whether this rank is the one that writes; its replicas only take part in averaging.
    """

    def __init__(
        self,
        monitor: MonitorMaster,
        figures: Callable[[], Sequence[Mapping[str, float] | None]],
        steps_per_print: int | None,
        writes: bool,
    ) -> None:
        self._monitor, self._figures = monitor, figures
        self._shown: dict[int, Mapping[str, float]] = {}
        self._steps_per_print = steps_per_print
        self._writes = writes
        self._pending: Update | None = None
        self._seconds = 0.0, 0.0
        self.begin(0, 0)

    def begin(self, step: int, samples: int) -> None:
        """Count time from here on, where `step` updates with `samples` samples have been applied."""
        self._printed = step, samples, time.perf_counter()

    def wants(self, step: int) -> bool:
        """Whether update number `step` will be reported; the same on every replica."""
        return self._monitor.enabled or (self._steps_per_print is not None and step % self._steps_per_print == 0)

    def add(self, update: Update) -> None:
        """Take an update in, which the next `flush` reports."""
        self._pending = update

    def flush(self, waits: bool = True) -> None:
        """Report the update that was added last, if it has not been reported yet.

        Args:
            waits: for the device; else an update whose loss has not arrived is left out.
        """
        update, self._pending = self._pending, None
        if update is None or not (self._writes and (waits or update.losses.has_arrived())):
            return
        loss, *additional = update.losses.numbers()
        compute, wait = (now - before for now, before in zip(update.seconds, self._seconds, strict=True))
        self._seconds = update.seconds
        waiting = wait / (compute + wait) if compute + wait > 0 else 0.0
        if self._monitor.enabled:
            events = {"train_loss": loss, **dict(zip(update.names, additional, strict=True))}
            events |= {"drift": update.drift, "waiting_share": waiting}
            self._monitor.write_events(
                [(f"Train/Samples/{name}", value, update.samples) for name, value in events.items()]
            )
            self._monitor.write_events([(*event, update.samples) for event in self._of_stages()])
        if self._steps_per_print is not None and update.step % self._steps_per_print == 0:
            self._print(update, loss, waiting)

    def _of_stages(self) -> Iterator[tuple[str, float]]:
        """The events of every stage that has told figures since it was asked last."""
        for stage, figures in enumerate(self._figures()):
            if figures is not None and figures != self._shown.get(stage):
                self._shown[stage] = figures
                yield from ((f"Train/Stage{stage}/{name}", value) for name, value in figures.items() if name != "loss")

    def _print(self, update: Update, loss: float, waiting: float) -> None:
        step, samples, at = self._printed
        self._printed = update.step, update.samples, update.at
        updates, seconds = update.step - step, update.at - at
        # Printed, not logged: it stands in for the line that DeepSpeed prints, which users' scripts parse.
        print(
            f"steps: {update.step} loss: {loss:0.4f} iter time (s): {seconds / updates:0.3f} "
            f"samples/sec: {(update.samples - samples) / seconds:0.3f} drift: {update.drift} waiting: {waiting:0.1%}",
            flush=True,
        )

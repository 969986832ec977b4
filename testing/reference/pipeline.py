"""The rounds of a pipe, for stages of any framework.

In round i of a pipe that was empty at round 0 every stage, first to last, runs the forward of micro-batch i, as long as
there are new ones, through its weights as they are at that moment.  Then it runs, where one is due, the backward of
micro-batch i - d through what that forward saved and the weights as they are by then; d is the stage's look-ahead.
After every a-th backward the stage steps its own optimizer.  A drain is rounds without new micro-batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch

from testing.reference import rules
from testing.reference.stage import Stage, StageRun

__all__ = ["Pipeline"]


class Pipeline:
    """All stages of a pipe, side by side in one process.

    Args:
        stages: first to last.
        accumulation: a.
        ahead: d of every stage.
        replicas: of every stage.
        ties: key of a tied weight -> the stages that hold a copy, in order.
        global_norm: whether a stage clips by the norm over all stages.
        agreed: the stages that have to take the norm that all take.
        prediction: "off", "every", "window" or a number, as the option says.

    Attributes:
        runs: the stages while it runs.
        emptied: updates that were done when the pipe was last empty.
        taken: micro-batches that have entered it since then.
        used: (stage, update, other stage) -> the update whose norm that stage contributed; below 0 for none.
        handed: key of a tied weight -> update -> stage -> gradients of its copy.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        accumulation: int,
        ahead: Sequence[int],
        *,
        replicas: int = 1,
        ties: Mapping[str, tuple[int, ...]] | None = None,
        global_norm: bool = False,
        agreed: Set[int] = frozenset(),
        prediction: str | int = "off",
    ) -> None:
        interval = {"off": 0, "every": 1, "window": 1 << 30}.get(prediction, prediction)
        self.runs = [StageRun(stage, interval) for stage in stages]
        self.accumulation, self.ahead, self.replicas = accumulation, ahead, replicas
        self.ties, self.global_norm, self.agreed = ties or {}, global_norm, agreed
        self.emptied = 0
        self.taken = 0
        self.used: dict[tuple[int, int, int], int] = {}
        self.handed: dict[str, dict[int, dict[int, list[torch.Tensor]]]] = defaultdict(lambda: defaultdict(dict))
        self._applied = [dict.fromkeys(self.ties, 0) for _ in stages]
        self._squares: dict[tuple[int, int], torch.Tensor] = {}
        self._losses: dict[int, list[float]] = {}
        self._finished: list[list[list[float]]] = [[] for _ in stages]
        self._gradients: dict[tuple[int, int], list[Any]] = {}
        self._round = 0
        self._flushing = False

    def train(self, batches: Sequence[Any], *, flush: bool = False) -> list[list[list[float]]]:
        """A round for each new micro-batch.

        Args:
            batches: for each micro-batch, the replicas' parts of it.
            flush: the pipe is empty, these are the micro-batches of one update, and no weight moves before the end.

        Returns:
            For each stage, the losses of the micro-batches whose backwards it has finished, by replica.
        """
        self._flushing = flush
        self.taken += len(batches)
        self._rounds(batches)
        if flush:
            self._rounds_until_empty()
            for part in (self._hand_in, self._measure, self._apply):
                for number in range(len(self.runs)):
                    part(number)
            self._empty()
        return self._told_once()

    def drain(self) -> list[list[list[float]]]:
        """Finish what is under way; the pipe is then empty.  Returns as `train`."""
        self.empty()
        return self._told_once()

    def empty(self) -> None:
        """As `drain`, but what is finished here is among what the next call returns."""
        self._rounds_until_empty()
        self._empty()

    def lead(self, batches: Sequence[Any]) -> list[list[list[float]]]:
        """Finish what is under way, while every stage runs ahead into the next micro-batches, which stay there.

        Args:
            batches: as many of the next micro-batches as the first stage runs ahead.

        Returns:
            As `train`.
        """
        self.taken += len(batches)
        end = self._round
        for beyond, batch in enumerate(batches):
            self._rounds([batch], sum(ahead > beyond for ahead in self.ahead), end)
        return self._told_once()

    def tied_delay(self, key: str) -> int:
        """j of a tied weight."""
        first, *_, last = self.ties[key]
        return rules.tied_delay(first, last, ahead=self.ahead, accumulation=self.accumulation)

    def _empty(self) -> None:
        self._round = self.taken = 0
        self.emptied = self.runs[0].version
        self._losses.clear()
        self._flushing = False

    def _told_once(self) -> list[list[list[float]]]:
        finished, self._finished = self._finished, [[] for _ in self.runs]
        return finished

    def _rounds_until_empty(self) -> None:
        while any(run.born for run in self.runs):
            self._rounds([None])

    def _rounds(self, batches: Sequence[Any], running: int | None = None, end: int | None = None) -> None:
        """A round for each micro-batch, or None: forwards of the first `running` stages, backwards before `end`."""
        for batch in batches:
            if batch is not None:
                self._forward(batch, self.runs[:running])
            for number, run in enumerate(self.runs):
                due = self._round - self.ahead[number]
                if due in run.born and (end is None or due < end):
                    self._finished[number].append(self._backward(number, due))
                    if len(run.window) == self.accumulation and not self._flushing:
                        self._hand_in(number)
                        self._measure(number)
                        self._apply(number)
            self._round += 1

    def _forward(self, batches: list[Any], runs: Sequence[StageRun]) -> None:
        passed: list[Any] = [None] * self.replicas
        for run in runs:
            ahead = self._round // self.accumulation - (run.version - self.emptied)
            passed = run.forward(self._round, batches, passed, self.accumulation, ahead)
        if len(runs) == len(self.runs):
            self._losses[self._round] = [loss.item() for loss in passed]

    def _backward(self, number: int, micro: int) -> list[float]:
        gradients = self._gradients.pop((number + 1, micro), [None] * self.replicas)
        losses = self._losses[micro]
        self._gradients[number, micro] = self.runs[number].backward(micro, gradients, losses, self.accumulation)
        if number == 0:
            del self._gradients[0, micro]
        return losses

    def _hand_in(self, number: int) -> None:
        """Give the gradients of tied weights to the other stages."""
        run = self.runs[number]
        run.begin_update()
        for key in self._keys(number):
            self.handed[key][run.version][number] = run.stage.tied_gradient(key)

    def _measure(self, number: int) -> None:
        """Take the tied sums that are due, and tell this stage's part of the norm."""
        run, applied = self.runs[number], self._applied[number]
        for key in self._keys(number):
            due = rules.tied_updates(run.version, applied[key], self.tied_delay(key), flushing=self._flushing)
            run.stage.take_tied(key, [self._sum(key, update) for update in due])
            applied[key] = max([applied[key], *(update + 1 for update in due)])
        self._squares[number, run.version] = run.stage.measure()

    def _keys(self, number: int) -> list[str]:
        return [key for key, stages in self.ties.items() if number in stages]

    def _sum(self, key: str, update: int) -> list[torch.Tensor]:
        """The sum over the copies of a tied weight of their gradients of an update."""
        copies = self.handed[key][update]
        assert set(copies) == set(self.ties[key]), "the rule names a sum that is not there yet"
        return [sum(parts) for parts in zip(*(copies[stage] for stage in sorted(copies)), strict=True)]

    def _apply(self, number: int) -> None:
        run = self.runs[number]
        run.stage.apply(self._norm(number, run.version))
        run.end_update()

    def _norm(self, stage: int, update: int) -> torch.Tensor:
        """The squared norm that an update is clipped by."""
        if not self.global_norm:
            return self._squares[stage, update]
        agreed = stage in self.agreed and not self._flushing
        others = []
        for other in range(len(self.runs)):
            if other != stage or agreed:
                at = self.used[stage, update, other] = rules.norm_update(
                    update,
                    stage,
                    other,
                    ahead=self.ahead,
                    accumulation=self.accumulation,
                    emptied=self.emptied,
                    taken=self.taken,
                    agreed=agreed,
                    flushing=self._flushing,
                )
                others.append(self._told(other, at))
        total = torch.stack(others).sum() if others else torch.zeros(())
        return total if agreed else self._squares[stage, update] + total

    def _told(self, stage: int, update: int) -> torch.Tensor:
        """A squared norm as other stages know it: 0 if there is none or it is not finite."""
        square = self._squares[stage, update] if update >= 0 else torch.zeros(())
        return square if square.isfinite() else torch.zeros(())

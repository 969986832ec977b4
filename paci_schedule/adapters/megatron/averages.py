"""The metrics of experts in ms-swift's log, which are means over the iterations since the line before.

ms-swift sums them over all stages when it writes the line.  A sum that is carried is one of an iteration, so here they
are summed in every iteration.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from paci_schedule.adapters.megatron.hooks import replace, stock_of
from paci_schedule.adapters.megatron.reported import of_the_pipeline, with_groups
from paci_schedule.runtime.deferred.reports import CarriedReports

__all__ = ["carry_averages"]

_ITERATION, _LINE = "_aggregated_metrics", "_log_callback"  # of a trainer, called in every one of them


def carry_averages(trainer: Any, carried: CarriedReports) -> None:
    """Let what a trainer's log line has of all stages be summed by what is carried; evaluations stay as they are."""
    summed = partial(with_groups, of_the_pipeline(carried), None, stock_of(trainer, _LINE))
    sums: dict[str, float] = {}

    def end_iteration(stock: Any, metrics: Any, total: dict[str, Any]) -> None:
        stock(metrics, total)
        if total is trainer._train_metrics and not trainer.state.should_log:
            own: dict[str, float] = {}
            summed(own, 1)
            for name, value in own.items():
                sums[name] = sums.get(name, 0) + value

    def write_line(stock: Any, logs: dict[str, Any], iterations: int) -> None:
        if logs is not trainer._train_metrics:
            stock(logs, iterations)
            return
        others = set(logs)
        summed(logs, 1)
        for name in logs.keys() - others:
            logs[name] = (sums.pop(name, 0) + logs[name]) / iterations

    for name, ours in ((_ITERATION, end_iteration), (_LINE, write_line)):
        replace(trainer, name, partial(ours, stock_of(trainer, name)))

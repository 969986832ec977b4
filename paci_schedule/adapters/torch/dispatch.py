"""The schedule's name, where torch.distributed.pipelining looks names up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.pipelining import schedules

from paci_schedule.adapters.rebinding import rebind
from paci_schedule.adapters.torch.hooks import check_installed
from paci_schedule.adapters.torch.options import PaciOptions

__all__ = ["install"]


class _Lookup:
    """``get_schedule_class`` that knows "paci" as well.

    Args:
        stock: torch's own.

    Attributes:
        options: of every schedule that is built from the class that is found.
    """

    def __init__(self, stock: Callable[[str], Any]) -> None:
        self.options: Mapping[str, Any] = {}
        self._stock = stock
        functools.update_wrapper(self, stock)

    def __call__(self, schedule_name: str) -> Any:
        if schedule_name.lower() != "paci":
            return self._stock(schedule_name)
        from paci_schedule.adapters.torch import titan
        from paci_schedule.adapters.torch.schedule import SchedulePaci

        titan.install()
        return type("SchedulePaci", (SchedulePaci,), {"defaults": self.options}) if self.options else SchedulePaci


def install(options: Mapping[str, Any] | None) -> None:
    """Let ``get_schedule_class`` know "paci", also where a module has imported it by name; None leaves the options."""
    if options is not None:
        PaciOptions.read(options)
    stock = schedules.get_schedule_class
    if not isinstance(stock, _Lookup):
        check_installed()
        rebind(stock, _Lookup(stock))
    lookup: Any = schedules.get_schedule_class
    lookup.options = lookup.options if options is None else dict(options)

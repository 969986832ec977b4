"""The rule that every trained parameter belongs to one stage and to one of that stage's optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from paci_schedule.errors import ConfigError, UnsupportedError

__all__ = ["as_lists", "check_owners"]


def as_lists(name: str, given: Sequence[Any], stages: int) -> list[list[Any]]:
    """One list for each stage; `given` has one object or one list for each stage.

    Raises:
        ConfigError: the number of entries is not the number of stages.
    """
    if len(given) != stages:
        raise ConfigError(f"{name} has {len(given)} entries for {stages} stages: give one, or a list, for each stage")
    return [list(each) if isinstance(each, tuple | list) else [each] for each in given]


def check_owners(stages: Sequence[nn.Module], optimizers: Sequence[Sequence[Optimizer]]) -> None:
    """Raises ConfigError or UnsupportedError unless every trained parameter has one stage and one of its optimizers."""
    stage_of: dict[int, int] = {}
    for number, module in enumerate(stages):
        for name, parameter in module.named_parameters():
            other = stage_of.setdefault(id(parameter), number)
            if other != number:
                raise UnsupportedError(
                    f"parameter {name} of stage {number} is also a parameter of stage {other}: the engines defer the "
                    "sum of tied gradients, a rehearsal cannot; untie the weight, or put its layers into one stage"
                )
    for number, module in enumerate(stages):
        steps = [id(p) for each in optimizers[number] for group in each.param_groups for p in group["params"]]
        for position in steps:
            if stage_of.get(position) != number:
                raise ConfigError(
                    f"optimizers[{number}] steps a parameter that stage {number} does not have: give every stage an "
                    "optimizer of its own parameters"
                )
        for name, parameter in module.named_parameters():
            count = steps.count(id(parameter))
            if parameter.requires_grad and count != 1:
                raise ConfigError(
                    f"parameter {name} of stage {number} is stepped by {count} of its optimizers: must be exactly one; "
                    "freeze the parameter (requires_grad_(False)) if it is not to be trained"
                )

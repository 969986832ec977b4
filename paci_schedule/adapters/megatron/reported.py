"""What the log line of a job sums over all stages: it is carried with the messages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megatron.core import parallel_state

from paci_schedule.adapters.megatron import groups
from paci_schedule.adapters.megatron.hooks import replace, stock_of
from paci_schedule.runtime.deferred.reports import CarriedReports, ReportGroup

__all__ = ["StandingIn", "carry", "of_the_pipeline", "with_groups"]

_IN_A_COLLECTION = {
    "_MODEL_PARALLEL_GROUP": "mp",
    "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "tp_ep_pp",
    "_PIPELINE_MODEL_PARALLEL_GROUP": "pp",
}
"""The names of the groups in `parallel_state`, and in a ProcessGroupCollection."""

StandingIn = Mapping[str, ReportGroup]
"""The groups that take the place of Megatron-core's, by the names that these have in `parallel_state`."""


def carry(loop: Any, carried: CarriedReports, utilities: Any = None) -> None:
    """Let the norm of the parameters and the metrics of the log line be summed over the stages by what is carried.

    Args:
        loop: the module of the training loop, which calls `calc_params_l2_norm` and `training_log`.
        carried: the sums.
        utilities: a module whose `get_pg_collection` tells the norm its groups; None where `parallel_state` does.
    """
    state: Any = parallel_state
    norm = {
        "_MODEL_PARALLEL_GROUP": ReportGroup(carried, state.get_model_parallel_group(), groups.tensor_parallel()),
        "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": ReportGroup(
            carried, state.get_expert_tensor_model_pipeline_parallel_group(), groups.experts()
        ),
    }
    for name, standing_in in (("calc_params_l2_norm", norm), ("training_log", of_the_pipeline(carried))):
        replace(loop, name, partial(with_groups, standing_in, utilities, stock_of(loop, name)))


def of_the_pipeline(carried: CarriedReports) -> StandingIn:
    """What stands in for the group of the stages."""
    return {"_PIPELINE_MODEL_PARALLEL_GROUP": ReportGroup(carried, groups.pipeline(), None)}


def with_groups(
    standing_in: StandingIn,
    utilities: Any,
    stock: Callable[..., Any],
    *values: Any,
    pg_collection: Any = None,
    **named: Any,
) -> Any:
    """Call `stock` with other groups in the place of Megatron-core's.

    Args:
        standing_in: these groups.
        utilities: as of `carry`.
        stock: which is called with the other arguments.
    """
    state: Any = parallel_state
    real = {name: getattr(state, name) for name in standing_in}
    if pg_collection is not None:
        named["pg_collection"] = _collection(standing_in, pg_collection)
    get = getattr(utilities, "get_pg_collection", None)
    vars(state).update(standing_in)
    if get is not None:
        utilities.get_pg_collection = lambda model: _collection(standing_in, get(model))
    try:
        return stock(*values, **named)
    finally:
        vars(state).update(real)
        if get is not None:
            utilities.get_pg_collection = get


def _collection(standing_in: StandingIn, real: Any) -> Any:
    collection = copy.copy(real)
    for name, group in standing_in.items():
        setattr(collection, _IN_A_COLLECTION[name], group)
    return collection

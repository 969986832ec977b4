"""The deferred state of a stage in every checkpoint of a job."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from paci_schedule.adapters.megatron import groups
from paci_schedule.adapters.megatron.job import Job
from paci_schedule.runtime.deferred.state import DeferredState
from paci_schedule.runtime.meeting import Meetings

__all__ = ["keep_deferred"]

logger = logging.getLogger(__name__)


def keep_deferred(
    job: Job,
    model: torch.nn.Module,
    deferred: DeferredState,
    settle: Callable[[], bool],
    sharded: bool,
    meetings: Meetings,
    timeout: timedelta,
) -> None:
    """Save the deferred state in the folder of every checkpoint, and begin with that of the loaded one.

    Every rank of the job calls it at the same time: where one of them finds nothing, or what was saved with other
    weights (a checkpoint that a run of the stock schedule has written anew), all begin with nothing deferred, for the
    copies of a tied weight must apply the same sums.

    Args:
        job: that saves.
        model: this stage's, loaded.
        deferred: of this stage.
        settle: called before a save; whether the pipe is empty.
        sharded: whether data-parallel ranks hold different parts of the gradients.
        meetings: of the job.
        timeout: how long other ranks may take.
    """
    name = _rank_name(sharded)
    writes = sharded or groups.replicas().rank() == 0

    def take() -> Callable[[Path], None]:
        empty = settle()
        state = deferred.state() if empty else {**deferred.state(), "norms": []}
        state = {**state, "weights": _fingerprint(model)} if writes else None
        return lambda folder: _write(state, folder / name)

    job.keep_deferred(take, parallel_state.get_pipeline_model_parallel_rank(), meetings, timeout)
    folder = job.loaded()
    if folder is not None:
        _load(folder / name, model, deferred)


def _write(state: dict[str, Any] | None, file: Path) -> None:
    """Write the file, which is whole or not there."""
    if state is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.new")
        torch.save(state, new)
        os.replace(new, file)


def _load(file: Path, model: torch.nn.Module, deferred: DeferredState) -> None:
    state = torch.load(file, weights_only=True, map_location="cpu") if file.is_file() else {}
    found: list[tuple[bool, bool]] = [(False, False)] * dist.get_world_size()
    dist.all_gather_object(found, (bool(state), bool(state) and state.get("weights") == _fingerprint(model)))
    there, fits = map(sum, zip(*found, strict=True))
    if fits == len(found):
        deferred.load_state(state)
    elif dist.get_rank() == 0:
        logger.warning(
            "%s holds the deferred state of a run under 'paci' for %d of the %d ranks of this topology, for %d of them "
            "with the weights of this checkpoint: this run begins with nothing deferred",
            file.parent,
            there,
            len(found),
            fits,
        )


def _fingerprint(model: torch.nn.Module) -> list[int]:
    """A number for each weight: the sum of its bytes, taken where it lies.  Another version of a model has another."""
    return [int(p.detach().flatten().view(torch.uint8).sum(dtype=torch.int64)) for p in model.parameters()]


def _rank_name(sharded: bool) -> str:
    """The name of this rank's file.  It names the topology, for in another one the file means nothing."""
    state = parallel_state
    name = f"stage{state.get_pipeline_model_parallel_rank()}of{state.get_pipeline_model_parallel_world_size()}"
    name += f"-tensor{state.get_tensor_model_parallel_rank()}of{state.get_tensor_model_parallel_world_size()}"
    if sharded:
        replicas = groups.replicas()
        name += f"-shard{replicas.rank()}of{replicas.size()}"
    return f"{name}.pt"

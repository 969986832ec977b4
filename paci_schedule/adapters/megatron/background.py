"""Checkpoints that Megatron-LM writes in the background (--async-save): when they are finished, and who writes them.

Megatron-LM hands what is to be written to a process of its own on every rank, and looks at the beginning of every
iteration whether all ranks' processes are done; then it finishes the checkpoint.  At the end of a job it waits for
them.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from paci_schedule.adapters.megatron.hooks import loaded, replace, stock_of
from paci_schedule.errors import CheckpointError
from paci_schedule.runtime.waiting import together

__all__ = ["REPLACED", "carry_out", "watch_writers"]

REPLACED = "schedule_async_save"
"""The function of megatron.training.checkpointing that is another here while a checkpoint is saved."""

Steps = Sequence[Callable[[], object]]

_PAUSE = 0.1  # seconds between two looks, at the end of a job


def carry_out(save: Callable[[], Any], finish: Callable[[Steps], None]) -> Any:
    """Carry out a save, and finish it: at once, or when Megatron-LM sees that all ranks have written.

    Args:
        save: calls Megatron-LM's own function.
        finish: called on all ranks when all files are written, with what is left of Megatron-LM's own steps.

    Returns:
        what `save` does.
    """
    module = loaded("megatron.training.checkpointing")
    schedule, requests = module.schedule_async_save, list[Any]()
    module.schedule_async_save = requests.append
    try:
        done = save()
    finally:
        module.schedule_async_save = schedule
    if not requests:
        finish([])
    else:
        steps = requests[-1].finalize_fns  # where Megatron-LM hands over several, it moves all steps to the last one
        steps[:] = [partial(finish, list(steps))]
        for request in requests:
            schedule(request)
    return done


def watch_writers(args: Namespace, stage: int, timeout: timedelta) -> None:
    """Let no rank wait for ever for a checkpoint that is written in the background.

    Megatron-LM waits without end for a writer that is gone.  Here the rank whose writer it is raises CheckpointError,
    and the others LinkError.

    Args:
        args: Megatron-LM's arguments.
        stage, timeout: as of `waiting`.
    """
    training, queue = loaded("megatron.training.training"), loaded("megatron.training.async_utils")
    stock = stock_of(training, "maybe_finalize_async_save")

    def maybe_finalize_async_save(blocking: bool = False, terminate: bool = False) -> None:
        while args.async_save and not queue.is_empty_async_queue():
            _look_at_writer(queue)
            with together(stage, "looked whether a checkpoint is written", timeout):
                stock(blocking=False)
            if not blocking:
                return
            time.sleep(_PAUSE)
        stock(blocking, terminate)

    replace(training, "maybe_finalize_async_save", maybe_finalize_async_save)


def _look_at_writer(queue: Any) -> None:
    """Raises CheckpointError if this rank's writer has ended before its time."""
    caller = queue._async_calls_queue.async_calls[0].async_caller
    ended = getattr(getattr(caller, "process", None), "exitcode", None)
    if ended:
        caller.process = None  # for which Megatron-LM would wait at the exit, too
        raise CheckpointError(
            f"the process that writes checkpoints for rank {dist.get_rank()} (--async-save) has ended with exit code "
            f"{ended}, so the checkpoint that it wrote is not complete; look at the log above, and start again from "
            "the checkpoint before"
        )

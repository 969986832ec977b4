"""Megatron-core: ``config.pipeline_schedule = "paci"``; Megatron-LM: ``--pipeline-schedule paci``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paci_schedule.adapters.megatron.hooks import probe

if TYPE_CHECKING:
    import torch

__all__ = [
    "load_state_dict",
    "look_at_arguments",
    "pipeline_stats",
    "probe",
    "register",
    "stage_figures",
    "state_dict",
]


def register(default: str | None = None, options: Mapping[str, Any] | None = None) -> None:
    """Let Megatron-core's schedules look at the model config's ``pipeline_schedule``.  Idempotent.

    They are what ``get_forward_backward_func`` returns.  Modules and classes that have one of them by name get ours
    under that name, with a warning.

    Args:
        default: the schedule of a model whose config names none; "1f1b" unless some call has set it.
        options: likewise, of a model whose config has no dictionary ``paci``.

    Raises:
        ConfigError: `default` is not a schedule, or an option that the rules do not allow.
        UnsupportedError: this Megatron-core is outside the tested range, a hook that we rely on is gone, or something
            keeps one of its schedules where no name leads to it.
    """
    from paci_schedule.adapters.megatron.dispatch import install

    install(default, options)


def look_at_arguments() -> None:
    """Let Megatron-LM refuse what PACI cannot run when it checks its arguments, in a script that trains under PACI.

    A rank that is lost while the checkpoint is loaded then ends the others within the timeout.  Call it after
    `register` and before the script's arguments are parsed.
    """
    from paci_schedule.adapters.megatron import loading, parsing

    parsing.look_at_arguments()
    loading.watch_loading()


def pipeline_stats(model: torch.nn.Module | list[torch.nn.Module]) -> dict[str, Any]:
    """What this rank's stage of `model` has done under PACI, counted as it happened.

    Args:
        model: as given to the forward-backward function.

    Returns:
        stage, stages, accumulation: where it stands in which pipeline;
        version: updates handed to the training loop;
        forwards, backwards: micro-batches done;
        in_flight, peak_in_flight: micro-batches between their forward and backward, now and at most;
        max_drift, drift_bound, drift_histogram: in updates; micro-batches for each drift;
        predictions: of weights, for stale forwards;
        loss: mean over the micro-batches finished in the last call, on every stage (waits for the device); NaN after
        one under 1F1B;
        compute_seconds, wait_seconds: what the stage computed and waited since the last call to this (on CUDA: ops
        that the device has finished).

    Raises:
        ConfigError: the model has not been trained under PACI.
    """
    from paci_schedule.adapters.megatron.dispatch import stream_of

    return stream_of(model).stats()


def stage_figures(model: torch.nn.Module | list[torch.nn.Module]) -> list[dict[str, float] | None]:
    """What every stage of `model` has told of its newest updates, about once a second; nobody waits for it.

    Returns:
        for each stage version, drift, waiting_share (0 to 1), loss, and tokens_per_second of all replicas
        (micro_batches_per_second of one replica outside Megatron-LM), as of an update not long ago; None for a stage
        that has told nothing yet.

    Raises:
        ConfigError: the model has not been trained under PACI.
    """
    from paci_schedule.adapters.megatron.dispatch import stream_of

    return stream_of(model).stage_figures()


def state_dict(model: torch.nn.Module | list[torch.nn.Module]) -> dict[str, Any]:
    """The deferred state of this rank's stage, for a checkpoint of a training loop of your own.

    Call it on every rank after ``optimizer.step()``, where the pipe is empty.  Megatron-LM's own checkpoints have it
    beside them.

    Returns:
        norms: the squared gradient norms of all stages of the newest updates;
        tied: the sums of the tied embedding's gradients that wait to be applied, by its name;
        factor: what the newest update was clipped by, for the next predictions; None where nothing is predicted;
        updates: done so far, for flush_warmup_steps.

    Raises:
        ConfigError: the model has not been trained under PACI, or micro-batches are in flight.
    """
    from paci_schedule.adapters.megatron.dispatch import stream_of

    return stream_of(model).state()


def load_state_dict(model: torch.nn.Module | list[torch.nn.Module], state: Mapping[str, Any]) -> None:
    """Let a model whose weights were loaded go on as the one that gave `state`; call it before the first call.

    Raises:
        ConfigError: the model is being trained under PACI already.
    """
    from paci_schedule.adapters.megatron.dispatch import load_state

    load_state(model, state)

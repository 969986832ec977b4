"""Jobs of the Megatron tests: the GPT of `megatron_model`, trained by a loop as Megatron-LM's is."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from testing import resources
from testing.collectives import recorded
from testing.kept import Kept
from testing.lives import Fault
from testing.megatron_model import (
    SEQUENCE,
    GptJob,
    build,
    import_megatron,
    mean_loss,
    micro_batch,
    set_up,
    token_loss,
)

__all__ = ["Trained", "forward_step", "live", "prepare", "refusals", "train", "train_all", "train_recorded", "wired"]


@dataclass
class Trained:
    """What one rank saw.

    Attributes:
        losses: of each call, the micro-batches' (last stage).
        evaluations: losses of each evaluation (last stage).
        gradients: of each call, name -> gradient before the update.
        weights: name -> weight at the end.
        stats: the schedule's own, at the end; empty for the stock schedule.
        pulled: micro-batches taken from the training iterator, after each call.
        parked: micro-batches in flight, after each call.
        norms: the gradient norm that each optimizer.step() returned.
        zeros: the number of zero gradients that each returned.
        kept: whether each call left the weights that it found.
        collectives: name and global ranks of every collective of the last call and the update after it.
    """

    losses: list[list[float]] = field(default_factory=list)
    evaluations: list[list[float]] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    pulled: list[int] = field(default_factory=list)
    parked: list[int] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    zeros: list[float | None] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)
    collectives: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)


def prepare() -> None:
    """Make Megatron importable in this process, and register the schedule."""
    import_megatron()
    import paci_schedule

    load = torch.storage._load_from_bytes
    paci_schedule.register("megatron")
    torch.storage._load_from_bytes = load  # Megatron-LM's main puts its own there, which imports Megatron to unpickle


def forward_step(data: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    """The forward step of pretrain_gpt.py: the first and the last stage take a micro-batch, the others take none."""
    from megatron.core import parallel_state

    tokens = labels = positions = None
    if parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage():
        batch = next(data).cuda()
        tokens, labels = batch[:, :-1], batch[:, 1:]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    loss = partial(token_loss, labels) if model.config.calculate_per_token_loss else mean_loss
    return model(tokens, positions, None, labels=labels), loss


class Counted:
    """An iterator that counts what was taken from it."""

    def __init__(self, source: Iterator[torch.Tensor]) -> None:
        self.source, self.taken = source, 0

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> torch.Tensor:
        item = next(self.source)
        self.taken += 1
        return item


def wired(job: GptJob) -> tuple[Any, Any]:
    """This rank's model and optimizer, and what its config must know of them."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    model, optimizer = build(job, parallel_state.get_pipeline_model_parallel_rank(), job.stages, job.stages)
    config = model.config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    for name, value in job.changes.items():
        setattr(model.ddp_config if hasattr(model.ddp_config, name) else config, name, value)
    if job.overlap_grad_reduce:
        config.no_sync_func = model.no_sync
        config.grad_sync_func = model.start_grad_sync if job.align_grad_reduce else None
    return model, optimizer


def train(
    job: GptJob,
    begins: Callable[[int], Any] = lambda call: None,
    build_stage: Callable[[GptJob], tuple[Any, Any]] = wired,
    kept: Kept | None = None,
) -> Trained:
    """Train on this rank, with the process groups of the job set up.

    Args:
        job: what to train.
        begins: told of every call before it begins.
        build_stage: makes this rank's model and optimizer.
        kept: the checkpoints, of which the newest one is where the job begins; one is saved at the
            ends that the job plans.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from paci_schedule.adapters.megatron import pipeline_stats, state_dict

    replica = parallel_state.get_data_parallel_rank()
    model, optimizer = build_stage(job)
    seen = Trained()
    accumulations = job.accumulations or (job.accumulation,) * job.calls
    count = sum(accumulations) + (job.stages if "train_iters" not in job.paci else 0)
    first, state = (0, None) if kept is None else kept.newest()
    if state is not None:
        _go_on(model, optimizer, state)
    indices = range(sum(accumulations[:first]), count - job.missing)
    data = Counted(micro_batch(index, replica, lengths=job.lengths) for index in indices)
    evaluated = sum(call <= first for call in job.evaluate_after)
    validation = (micro_batch(10_000 + index, replica) for index in range(2 * evaluated, 2 * len(job.evaluate_after)))
    shape = {"seq_length": SEQUENCE, "micro_batch_size": 2}
    for call, accumulation in enumerate(accumulations[first:], first):
        begins(call)
        if job.schedules:
            model.config.pipeline_schedule = job.schedules[call]
        model.zero_grad_buffer()
        optimizer.zero_grad()
        found = [p.detach().clone() for p in model.parameters()]
        reduced = get_forward_backward_func()(
            forward_step_func=forward_step,
            model=[model],
            num_microbatches=accumulation,
            forward_only=False,
            data_iterator=itertools.islice(data, job.of_each_call) if job.of_each_call else data,
            **shape,
        )
        seen.losses.append([entry["lm loss"].item() for entry in reduced])
        # The weights that are gathered late are those of the update before the call.
        seen.kept.append(job.overlap_param_gather or all(map(torch.equal, found, model.parameters())))
        if kept is None:
            seen.gradients.append({name: p.main_grad.clone().cpu() for name, p in model.named_parameters()})
        ok, norm, zeros = optimizer.step()
        assert ok or job.paci.get("on_nonfinite") == "skip"
        seen.norms.append(norm)
        seen.zeros.append(zeros)
        seen.pulled.append(data.taken)
        seen.parked.append(0 if job.schedule == "1f1b" or job.stages == 1 else pipeline_stats(model)["in_flight"])
        if call + 1 in job.evaluate_after:
            model.eval()
            with torch.no_grad():
                reduced = get_forward_backward_func()(
                    forward_step_func=forward_step,
                    data_iterator=validation,
                    model=[model],
                    num_microbatches=2,
                    forward_only=True,
                    **shape,
                )
            model.train()
            seen.evaluations.append([entry["lm loss"].item() for entry in reduced])
        if call + 1 == job.resume_after:
            if job.overlap_param_gather:
                model.start_param_sync(force_sync=True)
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), state_dict(model)))
            model, optimizer = build_stage(job)
            _go_on(model, optimizer, saved)
        if kept is not None and _is_end(job, call + 1):
            kept.save(call + 1, (model.state_dict(), optimizer.state_dict(), state_dict(model)))
    if job.overlap_param_gather:
        model.start_param_sync(force_sync=True)
    seen.weights = {name: p.detach().clone().cpu() for name, p in model.module.named_parameters()}
    if job.schedule == "paci" and job.stages > 1:
        seen.stats = pipeline_stats(model)
    return seen


def _is_end(job: GptJob, calls: int) -> bool:
    """Whether the pipe is empty after so many calls."""
    interval = job.paci.get("drain_interval")
    return bool(interval) and calls % interval == 0


def _go_on(model: Any, optimizer: Any, saved: tuple[Any, Any, Any]) -> None:
    """Load what a stage has saved into one that is built anew."""
    from paci_schedule.adapters.megatron import load_state_dict

    model.load_state_dict(saved[0])
    # By number: what the layer-wise optimizer takes, and any chain.
    optimizer.load_state_dict(dict(enumerate(saved[1])) if isinstance(saved[1], list) else saved[1])
    load_state_dict(model, saved[2])


def live(job: GptJob, fault: Fault | None, folder: str) -> tuple[int, Trained, list[resources.Held]]:
    """What a rank does in one life, as `lives.live`; its calls are the actions.

    Returns:
        the call with which it began, what it saw from then on, and what it held before each of its calls.
    """
    prepare()
    set_up(job)
    rank, readings = dist.get_rank(), []
    kept = Kept(folder, rank, job.stages)
    first, _ = kept.newest()
    dist.barrier()  # nobody saves before all have looked
    print(f"went on from action {first}.", flush=True)
    strikes = None if fault is None else first + int(fault.at * (job.calls - first))

    def begins(call: int) -> None:
        readings.append(resources.held())
        if fault is not None and call == strikes and rank == fault.rank:
            fault.strike()

    trained = train(job, begins, kept=kept)
    if fault is not None and rank == fault.rank:
        time.sleep(2 * fault.seconds)  # for one that comes after the last call
    return first, trained, readings


def train_recorded(job: GptJob) -> Trained:
    """Train one job, with the collectives of its last call recorded."""
    prepare()
    set_up(job)
    begun: list[int] = []
    seen: list[tuple[int, str, tuple[int, ...]]] = []
    with recorded(lambda name, ranks: seen.append((len(begun), name, tuple(ranks)))):
        trained = train(job, begun.append)
    trained.collectives = [(name, ranks) for call, name, ranks in seen if call == job.calls]
    return trained


def train_all(jobs: list[GptJob]) -> list[Trained]:
    """Train several jobs, one after the other, on the same ranks."""
    prepare()
    results = []
    for job in jobs:
        set_up(job)
        results.append(train(job))
    return results


def refusals(jobs: list[GptJob], build_stage: Callable[[GptJob], tuple[Any, Any]] = wired) -> list[str]:
    """Train several jobs that should be refused; returns what each was refused with, or "" if it was not."""
    prepare()
    from paci_schedule import PaciError

    said = []
    for job in jobs:
        set_up(job)
        try:
            train(job, build_stage=build_stage)
            said.append("")
        except PaciError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said

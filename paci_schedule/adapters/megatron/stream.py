"""One model chunk's endless stream, cut into the calls of a Megatron training loop (forwards leading)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from paci_schedule import __version__
from paci_schedule.adapters.megatron import groups
from paci_schedule.adapters.megatron.bridge import Bridge
from paci_schedule.adapters.megatron.checkpoint import keep_deferred
from paci_schedule.adapters.megatron.compute import ModelCompute
from paci_schedule.adapters.megatron.ends import JobEnds, PlannedEnds
from paci_schedule.adapters.megatron.evaluating import timed_messages
from paci_schedule.adapters.megatron.megatron_lm import MegatronLM
from paci_schedule.adapters.megatron.options import PaciOptions
from paci_schedule.adapters.megatron.prediction import build_prediction
from paci_schedule.adapters.megatron.refusals import check_supported
from paci_schedule.adapters.megatron.skipping import leave_out_nonfinite
from paci_schedule.adapters.megatron.stage_local import StageSums, is_sharded, optimizers, owner_of
from paci_schedule.adapters.megatron.swift import Swift
from paci_schedule.adapters.megatron.ties import Ties
from paci_schedule.adapters.megatron.working import copied_bytes
from paci_schedule.adapters.start_line import say, start_line
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError
from paci_schedule.runtime.assembly import Assembly
from paci_schedule.runtime.meeting import Meetings, require_alike

__all__ = ["FRAMEWORK", "ModelStream"]

FRAMEWORK = "Megatron-core"


class ModelStream:
    """Trains one chunk, call by call; micro-batches that are in flight when a call returns stay parked until the next.

    Every rank of the job constructs its own at the same time.

    Args:
        chunks: the model as the training loop holds it.
        group: the pipeline's process group.
        options: of the schedule.
        name: of the schedule, which has calls that lead.
        call: the other arguments of the first call.

    Raises:
        UnsupportedError: with every reason why this job cannot run under PACI.
    """

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        group: dist.ProcessGroup,
        options: PaciOptions,
        name: str,
        call: dict[str, Any],
    ) -> None:
        self._model, self._config = chunks[0], get_model_config(chunks[0])
        self._job = job = MegatronLM.running() or Bridge.running() or Swift.running()
        timeout = timedelta(seconds=options.timeout)
        self._meetings = Meetings(group.rank(), timeout)
        settings = _settings(options, name, group.size(), call["num_microbatches"])
        require_alike(self._meetings.gather("began to train under the schedule", settings))
        pipelines = check_supported(chunks, self._config, options, job, call, dist.get_process_group_ranks(group))
        stage, stages = group.rank(), group.size()
        spec = PipelineSpec(stages=stages, accumulation=call["num_microbatches"])
        self._ends = PlannedEnds.of_options(options) if job is None else JobEnds(job)
        if options.record is not None and self._ends.next_end(0, spec) is None:
            raise ConfigError(
                f"config.paci = {{'record': {options.record!r}}}: a recording is written where the pipe is empty, and "
                "no end is known; say 'train_iters' or 'drain_interval' too"
            )
        self._device, self._timeout = device, timeout = next(self._model.parameters()).device, timeout
        shares = getattr(call.get("pg_collection"), "embd", None) or groups.embedding()
        self._ties = ties = Ties(self._model, stage, shares, spec, timeout)
        self._assembly = Assembly(
            spec,
            stage,
            group,
            device,
            carries_norms=options.clip == "global",
            shares_weights=bool(ties.stages),
            timeout=timeout,
            early_receives=options.early_receives,
            record=options.record,
            replica=groups.replicas().rank(),
            varying_shapes=self._config.variable_seq_lengths,
        )
        prediction = build_prediction(self._model, self._config, options)
        self._sums = StageSums(self._config, self._assembly.norms, warn=stage == 0)
        self._compute = ModelCompute(
            self._model, self._config, stage == 0, stage == stages - 1, ties.post_sum, prediction is not None
        )
        if options.on_nonfinite == "skip":
            tied, norms = bool(ties.gradients), self._assembly.norms
            leave_out_nonfinite(self._model, self._config, stage, device, tied, self._sums, norms)
        self._reports = None if job is None else job.reports(device)
        self._assembly.connect(
            self._compute,
            schedule("paci" if name == "1f1b" else name, leading=True),  # whose calls before it is applied may flush
            pipelines,
            ties.gradients,
            ties.stages,
            prediction,
            self._reports,
            _loss,
            watched=self._model if options.on_nonfinite == "raise" else None,
            spike=options.spike,
            replicas=groups.stage(),  # with the slices, whose losses are alike, so that they decide alike, too
        )
        self._deferred = self._assembly.deferred
        self._runner, self._warmup = self._assembly.runner, options.flush_warmup_steps
        self._is_updating = self._spiked = False
        self._loss: torch.Tensor | None = None
        self._data: Any = None
        self._calls = self._resumed_at = 0
        self._between_calls = ExitStack()
        owner: Any = owner_of(self._config)
        if owner is not None:
            owner.step = partial(self._step, owner.step)
        clip = None if owner is None else owner.config.clip_grad
        copied = 0 if prediction is None else copied_bytes(optimizers(self._config))
        line = start_line(schedule(name), spec, options, framework=FRAMEWORK, clip=clip, copied_bytes=copied)
        say(line)
        if job is not None:
            job.make_local(self._config, self._reports)
            sharded = is_sharded(self._config)
            keep_deferred(job, self._model, self._deferred, self.settle, sharded, self._meetings, timeout)
            job.before_restart(self._compute.let_go)

    def train_batch(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        num_microbatches: int,
        pg_collection: Any = None,
        force_all_reduce: bool | None = False,
        **_: Any,
    ) -> list[Any]:
        """One call: every stage finishes `num_microbatches` backwards, and the gradients are ready for the optimizer.

        Returns:
            at the last stage, what the loss function returned for each micro-batch; else an empty list.

        Raises:
            ConfigError: the number of micro-batches, or the data iterator, changed while some are parked.
            DataEndedError: the data ended while the first stage read ahead.
            LinkError: a neighbouring stage did not answer in time.
        """
        runner, config = self._runner, self._config
        self.settle()
        if self._job is not None:
            self._job.write_figures(self.stage_figures)
        data = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
        if data is not self._data:
            self._require_empty("another data_iterator than in the call before")
        self._respec(num_microbatches)
        self._assembly.stopwatch.start()
        self._data = data
        self._sums.flush(False)
        self._compute.begin(forward_step_func, data, num_microbatches)
        with self._assembly.accounted():
            self._loss = runner.lead_batch(self._last())
            reduced = self._compute.end()
            if config.finalize_model_grads_func is not None:
                with self._ties.exchanging(scale=self._by_tokens if config.calculate_per_token_loss else None):
                    config.finalize_model_grads_func(
                        [self._model], None, pg_collection=pg_collection, force_all_reduce=force_all_reduce
                    )
        self._end_call()
        if not runner.admitted and parallel_state.get_tensor_model_parallel_rank() == 0:
            self._assembly.write_recording()
        # The update that comes now writes to weights that parked micro-batches go on backward through: that is PACI,
        # not a mistake.
        parameters = tuple(self._model.parameters())
        self._between_calls.enter_context(torch.autograd._unsafe_preserve_version_counter(parameters))
        return reduced

    def begin_batch(self) -> bool:
        """Whether the update that comes runs under a flush: at the start of training, and after a loss spike."""
        spikes = self._assembly.spikes
        self._spiked = spikes is not None and spikes.wants_flush()
        done = self._resumed_at + self._calls if self._job is None else self._job.iteration
        warms_up = done < self._warmup
        return warms_up or (self._spiked and not self._runner.admitted)

    def flush_batch(self, stock: Callable[[], list[Any]], num_microbatches: int) -> list[Any]:
        """One call of Megatron-core's own schedule, `stock`, in between, or before the first of ours.

        Raises:
            ConfigError: on every rank, if micro-batches are parked.
            LinkError: a neighbouring stage did not answer in time.
        """
        self._require_empty("config.pipeline_schedule = '1f1b' after 'paci'")
        self.settle()
        self._respec(num_microbatches)
        self._sums.flush(True)
        self._last()  # asked before every call, for an end that others decide
        flushed, timed = self._assembly.accounted(flushed=True), self._timed("trained under 1f1b")
        with flushed, timed, self._ties.exchanging(now=True):
            reduced = stock()
        self._runner.count_flushed(schedule("1f1b"))
        self._loss = None
        self._end_call()
        return reduced

    def evaluate(self, stock: Callable[[], list[Any]]) -> list[Any]:
        """A call of Megatron-core's own schedule that trains nothing; what is parked stays as it is.

        Raises:
            LinkError: a neighbouring stage did not answer in time.
        """
        with self._assembly.accounted(), self._timed("evaluated"):
            return stock()

    def settle(self) -> bool:
        """The update after the last call is done.  Returns whether nothing is parked."""
        self._between_calls.close()
        empty = not self._runner.admitted
        if self._is_updating:
            self._assembly.close_update()
            if empty:
                self._deferred.exchange()
        self._is_updating = False
        return empty

    def state(self) -> dict[str, Any]:
        """See `paci_schedule.adapters.megatron.state_dict`."""
        self._require_empty("state_dict(model)")
        self.settle()
        return {**self._deferred.state(), "updates": self._resumed_at + self._calls}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `paci_schedule.adapters.megatron.load_state_dict`."""
        self._resumed_at = state.get("updates", 0)
        self._deferred.load_state(state)

    def stats(self) -> dict[str, Any]:
        """See `paci_schedule.adapters.megatron.pipeline_stats`."""
        stats = self._runner.stats()
        return {**stats, "loss": float("nan") if self._loss is None else _loss(self._loss.tolist())}

    def stage_figures(self) -> list[dict[str, float] | None]:
        """See `paci_schedule.adapters.megatron.stage_figures`."""
        rates = {"micro_batches_per_second": 1}
        if self._job is not None and self._job.tokens is not None:
            rates = {"tokens_per_second": self._job.tokens * groups.replicas().size()}
        before = self._resumed_at + self._calls - self._runner.meter.version
        return [each and each.told(before, **rates) for each in self._assembly.bulletin.read()]

    def _step(self, stock: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """The optimizer's step, which the training loop takes between two calls."""
        with self._assembly.accounted(flushed=self._sums.flushing):
            return stock(*args, **named)

    def _timed(self, doing: str) -> AbstractContextManager[None]:
        return timed_messages(doing, self._runner.stage, self._device, self._timeout)

    def _respec(self, num_microbatches: int) -> None:
        runner = self._runner
        if num_microbatches != runner.spec.accumulation:
            self._require_empty(f"num_microbatches={num_microbatches} after {runner.spec.accumulation}")
            runner.respec(PipelineSpec(stages=runner.spec.stages, accumulation=num_microbatches))

    def _by_tokens(self) -> None:
        """Make the gradients, which are sums over tokens, means over those of the update, of all replicas.

        The last stage's numbers of tokens came with the gradients of the same micro-batches.
        """
        assert self._loss is not None, "a call has ended"
        tokens = (self._loss[1] * self._runner.spec.accumulation).round().to(torch.int)
        dist.all_reduce(tokens, group=groups.replicas())
        model: Any = self._model
        model.scale_gradients(1.0 / tokens.clamp(min=1))

    def _end_call(self) -> None:
        """What the training loop does next is the update, and then its reports."""
        self._calls += 1
        self._is_updating = True
        if self._reports is not None:
            arrived = self._calls > -(-self._runner.spec.stages // self._runner.spec.accumulation)
            self._reports.begin_update(at_once=not (arrived and self._runner.admitted))

    def _require_empty(self, what: str) -> None:
        """Raises ConfigError if micro-batches are parked; every rank of a pipeline knows how many."""
        runner = self._runner
        if runner.admitted:
            raise ConfigError(
                f"{what}, with {runner.admitted - runner.finished} micro-batches in flight, would lose or mix them: "
                "do it where the pipe is empty, after the calls that config.paci = {'drain_interval': n} or "
                "{'train_iters': n} plans"
            )

    def _last(self) -> int | None:
        """Micro-batches, counted since the pipe was last empty, after which it shall be empty again."""
        runner, accumulation = self._runner, self._runner.spec.accumulation
        done = self._calls if self._job is None else self._job.iteration
        end = self._ends.next_end(done, runner.spec)
        last = None if end is None else runner.finished + (end - done) * accumulation
        if self._spiked:  # as soon as what is read ahead makes whole updates
            soonest = runner.finished - (runner.finished - runner.admitted) // accumulation * accumulation
            last = soonest if last is None else min(last, soonest)
        return last


def _loss(losses: Sequence[float]) -> float:
    """The mean loss, of what a micro-batch tells: that, or the sum of its tokens' losses and their number."""
    loss, *tokens = losses
    return loss / max(tokens[0], 1) if tokens else loss


def _settings(options: PaciOptions, name: str, stages: int, accumulation: int) -> dict[str, Any]:
    """What has to be the same on all ranks, by name as a user writes it; folders may differ."""
    return {
        "the version of paci_schedule": __version__,
        "config.pipeline_schedule": name,
        "the number of stages": stages,
        "num_microbatches": accumulation,
        **{f"{key} in config.paci": value for key, value in asdict(options).items() if key != "record"},
    }

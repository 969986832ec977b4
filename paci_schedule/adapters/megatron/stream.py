"""One model chunk's endless stream, cut into the calls of a Megatron training loop (forwards leading)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from paci_schedule.adapters.megatron import groups, job
from paci_schedule.adapters.megatron.checkpoint import keep_deferred
from paci_schedule.adapters.megatron.compute import ModelCompute
from paci_schedule.adapters.megatron.ends import PlannedEnds
from paci_schedule.adapters.megatron.options import PaciOptions
from paci_schedule.adapters.megatron.prediction import build_prediction
from paci_schedule.adapters.megatron.refusals import check_supported
from paci_schedule.adapters.megatron.stage_local import StageSums, is_sharded
from paci_schedule.adapters.megatron.ties import Ties
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError
from paci_schedule.runtime.assembly import Assembly

__all__ = ["ModelStream"]


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
        args = job.current_args()
        pipelines = check_supported(chunks, self._config, options, args, call, dist.get_process_group_ranks(group))
        self._ends = PlannedEnds.of_options(options) if args is None else PlannedEnds.of_job(args)
        if options.record is not None and self._ends.next_end(0) is None:
            raise ConfigError(
                f"config.paci = {{'record': {options.record!r}}}: a recording is written where the pipe is empty, and "
                "no end is known; say 'train_iters' or 'drain_interval' too"
            )
        stage, stages = group.rank(), group.size()
        device = next(self._model.parameters()).device
        spec = PipelineSpec(stages=stages, accumulation=call["num_microbatches"])
        timeout = timedelta(seconds=options.timeout)
        shares = getattr(call.get("pg_collection"), "embd", None) or groups.embedding()
        self._ties = ties = Ties(self._model, shares, spec, timeout)
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
            varying_shapes=self._config.variable_seq_lengths,
        )
        prediction = build_prediction(self._model, self._config, options)
        self._sums = StageSums(self._config, self._assembly.norms, warn=stage == 0)
        self._compute = ModelCompute(self._model, self._config, stage == 0, stage == stages - 1, ties.post_sum)
        self._assembly.connect(
            self._compute, schedule(name, leading=True), pipelines, ties.gradients, ties.stages, prediction
        )
        self._deferred = self._assembly.deferred
        self._runner, self._warmup = self._assembly.runner, options.flush_warmup_steps
        self._is_updating = False
        self._loss: torch.Tensor | None = None
        self._data: Any = None
        self._calls = self._resumed_at = 0
        self._between_calls = ExitStack()
        if args is not None:
            job.make_local(self._config)
            keep_deferred(args, self._model, self._deferred, self.settle, sharded=is_sharded(self._config))

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
        data = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
        if data is not self._data:
            self._require_empty("another data_iterator than in the call before")
        self._respec(num_microbatches)
        self._assembly.stopwatch.start()
        self._data = data
        self._sums.flush(False)
        self._compute.begin(forward_step_func, data, num_microbatches)
        self._loss = runner.lead_batch(self._last())
        reduced = self._compute.end()
        if config.finalize_model_grads_func is not None:
            with self._ties.exchanging():
                config.finalize_model_grads_func(
                    [self._model], None, pg_collection=pg_collection, force_all_reduce=force_all_reduce
                )
        self._end_call()
        if not runner.admitted and parallel_state.get_tensor_model_parallel_rank() == 0:
            self._assembly.write_recording(parallel_state.get_data_parallel_rank())
        # The update that comes now writes to weights that parked micro-batches go on backward through: that is PACI,
        # not a mistake.
        parameters = tuple(self._model.parameters())
        self._between_calls.enter_context(torch.autograd._unsafe_preserve_version_counter(parameters))
        return reduced

    def is_warming_up(self) -> bool:
        """Whether the update that comes is one of those at the start of training that run under a flush."""
        done = job.iteration()
        return (self._resumed_at + self._calls if done is None else done) < self._warmup

    def flush_batch(self, stock: Callable[[], list[Any]], num_microbatches: int) -> list[Any]:
        """One call of Megatron-core's own schedule, `stock`, in between, or before the first of ours.

        Raises:
            ConfigError: on every rank, if micro-batches are parked.
        """
        self._require_empty("config.pipeline_schedule = '1f1b' after 'paci'")
        self.settle()
        self._respec(num_microbatches)
        self._sums.flush(True)
        with self._ties.exchanging(now=True):
            reduced = stock()
        self._runner.count_flushed(schedule("1f1b"))
        self._loss = None
        self._end_call()
        return reduced

    def settle(self) -> bool:
        """The update after the last call is done.  Returns whether nothing is parked."""
        self._between_calls.close()
        empty = not self._runner.admitted
        if self._is_updating:
            self._deferred.close_update()
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
        return {**stats, "loss": float("nan") if self._loss is None else self._loss.item()}

    def _respec(self, num_microbatches: int) -> None:
        runner = self._runner
        if num_microbatches != runner.spec.accumulation:
            self._require_empty(f"num_microbatches={num_microbatches} after {runner.spec.accumulation}")
            runner.respec(PipelineSpec(stages=runner.spec.stages, accumulation=num_microbatches))

    def _end_call(self) -> None:
        """What the training loop does next is the update."""
        self._calls += 1
        self._is_updating = True

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
        runner = self._runner
        done = job.iteration()
        if done is None:
            done = self._calls
        end = self._ends.next_end(done)
        return None if end is None else runner.finished + (end - done) * runner.spec.accumulation

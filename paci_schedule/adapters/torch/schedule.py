"""PACI as a schedule of torch.distributed.pipelining: what `Schedule1F1B` is, without its flush.

Backwards lag: a call takes in one batch and nothing more, so stage s ends it with d_s = P-1-s micro-batches whose
backwards are done in the next call.  An update therefore falls into the middle of a call at every stage but the last.
That is why the schedule holds the optimizers.  A loop that steps them itself, after the call, would need forwards that
lead, and with them data from beyond the batch that the call was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.pipelining.microbatch import split_args_kwargs_into_chunks
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.distributed.pipelining.stage import _PipelineStageBase

from paci_schedule.adapters.choice import RUNNABLE, check_choice
from paci_schedule.adapters.ending import Ending
from paci_schedule.adapters.refusal import refuse_together
from paci_schedule.adapters.start_line import say, start_line
from paci_schedule.adapters.torch.compute import Batch, ModuleCompute
from paci_schedule.adapters.torch.evaluating import Evaluation
from paci_schedule.adapters.torch.hooks import check_installed
from paci_schedule.adapters.torch.options import PaciOptions
from paci_schedule.adapters.torch.refusals import HEADING, job_reasons, optimizer_reasons
from paci_schedule.adapters.torch.state import as_tensors, from_tensors
from paci_schedule.adapters.torch.ties import Ties
from paci_schedule.adapters.torch.update import StageUpdate
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.core.staleness import interval_of
from paci_schedule.errors import ConfigError
from paci_schedule.predict import Prediction, SteppedWeights
from paci_schedule.runtime.assembly import Assembly
from paci_schedule.runtime.deferred.tied import drop_overflow
from paci_schedule.runtime.stage import StageRunner

__all__ = ["SchedulePaci"]

_RUN = tuple(name for name in RUNNABLE if not schedule(name).splits_backward)


class SchedulePaci(PipelineScheduleSingle):
    """A drop-in for ``Schedule1F1B`` whose stages never flush between batches.

    It is built from the same ``PipelineStage`` and called in the same way.  The differences: it has the optimizers and
    steps them, and `drain` belongs before everything that reads weights, such as a checkpoint.  Every rank of the job
    constructs its own at the same time.

    Args:
        stage, loss_fn, args_chunk_spec, kwargs_chunk_spec, output_merge_spec, scale_grads: as of ``Schedule1F1B``.
        n_microbatches: a, the micro-batches of a call, after which every stage updates its weights; any number of at
            least 1.
        optimizers: of this stage's module, one or several; `set_optimizers` may give them later.
        lr_schedulers: of these optimizers; they are stepped after each update.
        max_norm: the norm over all stages that gradients are clipped to, where other stages' parts are as old as
            `runtime.deferred.norms` says; 0 for no clipping.
        tied: this stage's copies of weights that stages share, by a name that all copies have.
        options: "extra_in_flight", "prediction", "prediction_reach", "clip", "flush_warmup_steps", "loss_spike",
            "loss_spike_flush_steps", "early_receives", "on_nonfinite", "timeout" and "record", as in every framework
            (docs/torch.md).

    Attributes:
        defaults: options where the constructor is given none.
        loss: the mean loss of the micro-batches that this stage has finished in the newest call that finished any,
            float32[], on the device; None before there is one.

    Raises:
        ConfigError: an option, or another argument, breaks its rule.
        UnsupportedError: on every rank, with every reason why this job cannot run under PACI.
        LinkError: a neighbouring stage did not answer in time; also from `step` and `drain`.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        stage: _PipelineStageBase,
        n_microbatches: int,
        loss_fn: Callable[..., torch.Tensor] | None = None,
        args_chunk_spec: tuple[Any, ...] | None = None,
        kwargs_chunk_spec: dict[str, Any] | None = None,
        output_merge_spec: dict[str, Any] | tuple[Any] | None = None,
        scale_grads: bool = True,
        *,
        optimizers: Any = None,
        lr_schedulers: Any = (),
        max_norm: float = 0.0,
        tied: Mapping[str, torch.nn.Parameter] | None = None,
        **options: Any,
    ) -> None:
        check_installed()
        self._options = PaciOptions.read({**self.defaults, **options})
        spec = PipelineSpec(
            stages=stage.num_stages,
            accumulation=n_microbatches,
            extra_in_flight=self._options.extra_in_flight,
        )
        if loss_fn is None:
            raise ConfigError("SchedulePaci(loss_fn=None): give the loss function, on every rank; PACI only trains")
        chunking = (args_chunk_spec, kwargs_chunk_spec, output_merge_spec, scale_grads)
        super().__init__(stage, n_microbatches, loss_fn, *chunking)
        self.loss: torch.Tensor | None = None
        tied = tied or {}
        refuse_together(job_reasons(stage, list(tied.values()), self._options), HEADING)
        self._spec, self._schedule = spec, "paci"
        self._timeout = timedelta(seconds=self._options.timeout)
        self._group: dist.ProcessGroup = stage.group or distributed_c10d._get_default_group()
        pipelines: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(pipelines, dist.get_process_group_ranks(self._group))
        self._pipelines = [list(ranks) for ranks in dict.fromkeys(map(tuple, pipelines))]
        self._evaluation = Evaluation(stage, self._pipelines, self._timeout, n_microbatches, loss_fn, *chunking)
        self._ties = Ties(tied, self._pipelines, spec, self._timeout)
        self._assembly: Assembly | None = None
        self._ending: Ending | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._updates_before = 0
        if optimizers is not None:
            self.set_optimizers(optimizers, lr_schedulers, max_norm)

    def set_optimizers(self, optimizers: Any, lr_schedulers: Any = (), max_norm: float = 0.0) -> None:
        """Give the schedule its optimizers, before the first `step`; every rank of the job calls it at the same time.

        Args:
            optimizers, lr_schedulers, max_norm: as of the class.

        Raises:
            ConfigError: the schedule has optimizers already, or `max_norm` is no number of at least 0.
            UnsupportedError: on every rank, if the weights of an optimizer cannot be predicted.
        """
        if self._assembly is not None:
            raise ConfigError("set_optimizers(): the schedule has its optimizers already; give them once")
        if isinstance(max_norm, bool) or not isinstance(max_norm, int | float) or not 0 <= max_norm < float("inf"):
            raise ConfigError(f"max_norm={max_norm!r}: must be a number of at least 0; 0 means no clipping")
        stage, options, ties = self._stage, self._options, self._ties
        listed = _listed(optimizers)
        refuse_together(optimizer_reasons(listed, options), HEADING)
        assembly = Assembly(
            self._spec,
            stage.stage_index,
            self._group,
            torch.device(stage.device),
            carries_norms=max_norm > 0 and options.clip == "global" and self._spec.stages > 1,
            shares_weights=bool(ties.gradients),
            timeout=self._timeout,
            early_receives=options.early_receives,
            record=options.record,
            replica=next(at for at, ranks in enumerate(self._pipelines) if dist.get_rank() in ranks),
        )
        interval, prediction = interval_of(options.prediction), None
        if interval is not None:
            weights = SteppedWeights(listed, list(ties.weights.values()), drop_overflow if ties.weights else None)
            prediction = Prediction(weights, interval, options.prediction_reach)
        skips, replicas = options.on_nonfinite == "skip", None
        if skips or options.spike is not None:
            stages = [list(ranks) for ranks in zip(*self._pipelines, strict=True)]
            replicas, _ = dist.new_subgroups_by_enumeration(stages, timeout=self._timeout)
            assert isinstance(replicas, dist.ProcessGroup), "this rank has a stage"
        self._update = StageUpdate(
            stage,
            self._group,
            listed,
            _listed(lr_schedulers),
            max_norm,
            assembly.norms,
            ties,
            prediction,
            self._timeout,
            skips=replicas if skips else None,
        )
        assert self._loss_fn is not None, "the constructor asks for it"
        self._compute = ModuleCompute(
            stage, self._loss_fn, self._spec.accumulation, self.scale_grads, self._apply, ties.post_sum
        )
        assembly.connect(
            self._compute,
            schedule(self._schedule),
            self._pipelines,
            ties.gradients,
            ties.stages,
            prediction,
            watched=stage.submod if options.on_nonfinite == "raise" else None,
            spike=options.spike,
            replicas=replicas,
        )
        self._assembly, self._runner, self.device = assembly, assembly.runner, torch.device(stage.device)
        self._ending = Ending(self, dist.get_rank() == 0, self._timeout, "schedule.drain()")
        if self._loaded is not None:
            self.load_state_dict(self._loaded)
        copied = sum(each.nbytes for each in stage.submod.parameters() if each.requires_grad) if prediction else 0
        say(
            start_line(
                schedule(self._schedule),
                self._spec,
                options,
                framework="torch.distributed.pipelining",
                clip=max_norm,
                copied_bytes=copied,
            )
        )

    def step(
        self,
        *args: Any,
        target: Any = None,
        losses: list[Any] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Take in one batch, as ``Schedule1F1B.step``.

        On return, d_s = P-1-s backwards of stage s are outstanding; the next call, or `drain`, does them.

        Args:
            args: of the model, at the first stage.
            target: for the loss function, at the last stage.
            losses: takes the losses of the micro-batches that this stage has *finished* since it told of any, float32[]
                each: at the last stage those of this batch, at stage s those that are d_s older.
            return_outputs: whether the last stage returns its outputs.
            loss_kwargs: for the loss function.
            kwargs: of the module, at every stage.

        Returns:
            at the last stage the outputs for this batch, detached; else None.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("step() requires gradients to be enabled; call eval() to evaluate")
        assembly = self._connected()
        runner, stage = assembly.runner, self._stage
        if stage.is_last and target is None:
            raise ConfigError("step() without target= on the last stage: PACI trains in every step; use eval() else")
        split_args, split_kwargs = self._split_inputs(args, kwargs)
        assembly.stopwatch.start()
        warms_up = self._updates() < self._options.flush_warmup_steps
        assembly.begin_batch(schedule(self._schedule), warms_up, partial(self._empty, assembly))
        self._compute.batch = Batch(
            first=runner.admitted,
            args=split_args,
            kwargs=split_kwargs,
            targets=self._split_targets(target),
            loss_kwargs=loss_kwargs or {},
            outputs=[] if stage.is_last and return_outputs else None,
        )
        outputs = self._compute.batch.outputs
        try:
            with assembly.accounted():
                runner.admit_batch()
        finally:
            self._keep()
        self._tell(runner, losses)
        return None if outputs is None else self._merge_outputs(outputs)

    def eval(self, *args: Any, target: Any = None, losses: list[Any] | None = None, **kwargs: Any) -> Any:
        """Forwards only, as ``Schedule1F1B.eval``, after a `drain`: every stage evaluates the same version."""
        if self._assembly is not None:
            self._empty(self._assembly)
        return self._evaluation.eval(*args, target=target, losses=losses, **kwargs)

    def drain(self, losses: list[torch.Tensor] | None = None) -> None:
        """Finish the outstanding backwards; call it on every rank.

        Afterwards the pipe is empty and every stage has the same version: that is when weights may be read, saved or
        evaluated.

        Args:
            losses: as of `step`.
        """
        assembly = self._connected()
        self._empty(assembly)
        self._tell(assembly.runner, losses)

    def set_pipeline_schedule(self, name: str) -> None:
        """Go on with "paci", "1f1b" or "gpipe", after a `drain`; call it on every rank.

        Raises:
            ConfigError: an unknown name.
            UnsupportedError: another schedule.
        """
        self._schedule = check_choice(name, f"set_pipeline_schedule({name!r})", _RUN)
        self._empty(self._connected())

    @property
    def norm(self) -> torch.Tensor | None:
        """The norm that this stage's newest update was clipped by, float32[]; None where nothing is clipped."""
        return None if self._assembly is None else self._update.norm

    def stage_figures(self) -> list[dict[str, float] | None]:
        """What every stage has told of its newest updates, about once a second; nobody waits for it.

        Returns:
            for each stage version, drift, waiting_share (0 to 1), micro_batches_per_second and loss, as of an update
            not long ago; None for a stage that has told nothing yet.
        """
        before = self._updates() - self._runner.meter.version
        newest = self._connected().bulletin.read()
        return [each and each.told(before, micro_batches_per_second=1) for each in newest]

    def stats(self) -> dict[str, Any]:
        """What this stage has done, counted as it happened.

        Returns:
            as `runtime.stage.StageRunner.stats`; "version" counts the updates of the runs before as well.
        """
        return {**self._connected().runner.stats(), "version": self._updates()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the module's and the optimizers' state, with names of this stage's own.

        Every value is a tensor of a shape that only the job decides, so torch.distributed.checkpoint can save and load
        it in place.

        Raises:
            ConfigError: micro-batches are in flight.
        """
        assembly = self._connected()
        if assembly.runner.admitted:
            raise ConfigError(
                "SchedulePaci.state_dict() with micro-batches in flight: each stage stands at another version; call "
                "schedule.drain() on every rank before anything is saved"
            )
        state = as_tensors(assembly.deferred.state(), self._ties, self._spec)
        return {f"stage_{self._stage.stage_index}": {"updates": torch.tensor(self._updates()), **state}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on as the stage that gave `state_dict`, before the first `step`.

        Raises:
            ConfigError: it holds no state of this stage, or micro-batches are in flight.
        """
        if self._assembly is None:  # until the optimizers are there
            self._loaded = state_dict
            return
        name = f"stage_{self._stage.stage_index}"
        if name not in state_dict:
            raise ConfigError(f"load_state_dict(): no {name!r} among {sorted(state_dict)}; it is of another pipeline")
        if self._assembly.runner.admitted:
            raise ConfigError("load_state_dict() with micro-batches in flight, which would be lost: drain() first")
        stage = state_dict[name]
        self._assembly.deferred.load_state(from_tensors(stage))
        self._updates_before = int(stage["updates"]) - self._assembly.runner.meter.version

    def report(self, waits: bool) -> None:
        """Nothing: a schedule prints no losses (`Ending`)."""

    def _keep(self) -> None:
        """Outlive the script's last reference while micro-batches are in flight."""
        if self._ending is not None:
            self._ending.keep(self)

    def _step_microbatches(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("SchedulePaci.step() drives the runner")

    def _split_targets(self, target: Any) -> list[Any]:
        if target is None:
            return []
        targets, _ = split_args_kwargs_into_chunks((target,), None, self._n_microbatches)
        return [target for (target,) in targets]

    def _connected(self) -> Assembly:
        if self._assembly is None:
            raise ConfigError(
                "SchedulePaci without optimizers: a stage's update falls into the middle of a call, so the schedule "
                "steps them; give SchedulePaci(optimizers=...), and call neither optimizer.step() nor zero_grad()"
            )
        return self._assembly

    def _updates(self) -> int:
        return self._updates_before + self._connected().runner.meter.version

    def _tell(self, runner: StageRunner, losses: list[torch.Tensor] | None) -> None:
        """Tell of the micro-batches that no call has told of."""
        if losses is not None:
            losses[:] = [loss.reshape(()) for loss in runner.untold]
        mean = runner.take_losses()
        if mean is not None:
            self.loss = mean.reshape(())

    def _empty(self, assembly: Assembly) -> None:
        with assembly.accounted():
            assembly.runner.drain()
        self._keep()
        assembly.write_recording()

    def _apply(self, update: int) -> None:
        assembly = self._connected()
        self._update.apply(assembly.runner.at, assembly.runner.flushing)
        assembly.close_update()


def _listed(given: Any) -> Sequence[Any]:
    """One or several, as a list; a container of optimizers, as torchtitan has it, is iterated."""
    return list(given) if hasattr(given, "__iter__") else [given]

"""Carry out a job with DeepSpeed: what one rank does, and how to compare it with the reference.

The functions that run on a rank import DeepSpeed themselves, so that the process that compares needs no framework.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from testing import jobs, ranks
from testing.jobs import Job, Shared
from testing.reference import versions
from testing.reference.deepspeed import Moment, Reference

__all__ = [
    "Feed",
    "Runs",
    "act",
    "assert_as_reference",
    "assert_equal",
    "assert_moment",
    "build",
    "cases",
    "config",
    "follow",
    "moment",
    "run",
    "run_all",
    "run_resumed",
    "tied_spec",
    "train",
    "weights",
]


def config(job: Job, schedule: str | None) -> dict[str, Any]:
    """The DeepSpeed config of a job; `schedule` is "pipeline_schedule"; None and "stock" leave it and "paci" out."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": job.accumulation,
        "gradient_clipping": job.clip,
        "steps_per_print": 10**9,  # older versions take no None
    }
    if job.precision != "fp32":
        settings["bf16"] = {"enabled": True}
    if job.precision == "bf16":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["zero_allow_untested_optimizer"] = True
        settings["zero_optimization"] = {"stage": 1, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}
    if schedule not in (None, "stock"):
        settings["pipeline_schedule"] = schedule
    for key, value in copy.deepcopy(job.config).items():  # older versions take options out of it
        both = isinstance(settings.get(key), dict) and isinstance(value, dict)
        settings[key] = {**settings[key], **value} if both else value
    if schedule in (None, "stock"):
        settings.pop("paci", None)
    return settings


def build(
    job: Job,
    schedule: str | None = "paci",
    layers: list[Any] | None = None,
    training_data: Any = None,
    **module_options: Any,
) -> Any:
    """The engine of this rank.  Registers the schedules unless `schedule` is "stock".

    Args:
        job: what to train.
        schedule: as of `config`.
        layers: of the model; None for those that the job names.
        training_data: what the engine's own loader reads; None for no such loader.
        module_options: for the PipelineModule.
    """
    import deepspeed
    from deepspeed.pipe import PipelineModule

    if schedule != "stock":
        import paci_schedule

        paci_schedule.register("deepspeed")
    deepspeed.init_distributed(verbose=False)
    options = {"num_stages": job.stages, "partition_method": "uniform", "loss_fn": jobs.loss, **module_options}
    options.setdefault("dynamic_shape", bool(job.shapes))
    module = PipelineModule(jobs.layers(job.model, tied_spec) if layers is None else layers, **options)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=None if "optimizer" in job.config else jobs.optimizer(job),
        model_parameters=jobs.parameter_groups(job, parameters) if parameters else parameters,
        lr_scheduler=jobs.schedule(job),
        training_data=training_data,
        config=config(job, schedule),
    )
    if job.marked:
        for parameter in engine.module.parameters():
            parameter.model_parallel = True
    jobs.poison(job, engine.stage_id, list(engine.module.parameters()))
    return engine


def tied_spec(key: str, *how: bool) -> Any:
    """A layer with a shared weight, as DeepSpeed wants it declared; the arguments are those of `Shared`."""
    from deepspeed.pipe import TiedLayerSpec

    return TiedLayerSpec(key, Shared, key, *how)


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """A copy of this stage's parameters, by layer number and name."""
    return {name: value.detach().cpu().clone() for name, value in engine.module.named_parameters()}


class Feed:
    """The training data of a rank, counting what is pulled from it."""

    def __init__(self, source: Iterator) -> None:
        self._source = source
        self.pulled = 0

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Any:
        batch = next(self._source)
        self.pulled += 1
        return batch


def act(engine: Any, job: Job, action: str, feed: Iterator, folder: str | None = None) -> float:
    """Do one action of a script; the loss it returns, NaN if none."""
    name, _, value = action.partition("=")
    if name == "train":
        loss = engine.train_batch(feed)
        assert isinstance(loss, torch.Tensor)
        assert loss.numel() == 1
        assert not loss.requires_grad
        return loss.item()
    if name == "eval":
        return float(engine.eval_batch(jobs.data(job.model, jobs.EVALUATION_DATA)))
    if name == "save":
        engine.save_checkpoint(folder, tag="common")
    elif name == "load":
        path, _ = engine.load_checkpoint(folder, tag="common")
        assert path is not None
    elif name == "accumulate":
        engine.set_train_batch_size(int(value) * engine.train_micro_batch_size_per_gpu())
    elif name == "samples":
        engine.set_train_micro_batch_size(int(value))
    elif name == "schedule":
        engine.set_pipeline_schedule(value)
    elif name == "rate":
        for group in engine.optimizer.param_groups:
            group["lr"] = float(value)
    elif name == "reset":
        engine.reset_activation_shape()
    elif name == "drained":
        with engine.drained() as module:
            assert module is engine.module
    else:
        engine.drain()
    return math.nan


def train(
    job: Job,
    schedule: str | None = "paci",
    folder: str | None = None,
    load: bool = False,
    inspect: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """What a rank does: build the engine, load a checkpoint if told to, and `follow` the script.

    Returns:
        As `follow`; "drift_bound" and "steps" of the engine at the end; "inspected": what `inspect` says about it.
    """
    engine = build(job, schedule)
    if load:
        path, _ = engine.load_checkpoint(folder, tag="common")
        assert path is not None
    return {
        **follow(engine, job, folder),
        "drift_bound": engine.pipeline_stats()["drift_bound"] if hasattr(engine, "pipeline_stats") else None,
        "steps": engine.global_steps,
        "inspected": inspect and inspect(engine),
    }


def follow(engine: Any, job: Job, folder: str | None = None) -> dict[str, Any]:
    """Carry out the script of a job.

    Returns:
        "stage"; "moments": this stage's part of every `Moment`, with the engine's own counters in "stats"; "pulled":
        after every action, the micro-batches pulled from the iterator so far.
    """
    feed = Feed(jobs.data(job.model, job.first_micro_batch, job.shapes))
    moments, pulled = [], []
    for action in job.actions():
        moments.append(moment(engine, action, act(engine, job, action, feed, folder)))
        pulled.append(feed.pulled)
    return {"moments": moments, "pulled": pulled, "stage": engine.stage_id}


def moment(engine: Any, action: str, loss: float) -> dict[str, Any]:
    """What a stage has come to after an action that returned this loss: its part of a `Moment`, and "stats"."""
    stats = engine.pipeline_stats() if hasattr(engine, "pipeline_stats") else {"version": engine.global_steps}
    norm = engine.get_global_grad_norm()
    return {
        "action": action,
        "loss": loss,
        "weights": weights(engine),
        "stats": stats,
        "rate": engine.get_lr()[0],
        "norm": math.nan if norm is None else float(norm),
    }


def run(job: Job, schedule: str | None = "paci", *, timeout: float = 120.0, **options: Any) -> list[dict[str, Any]]:
    """Carry out a job on as many ranks as it has stages; what `train` returned, by stage."""
    return run_all((job, schedule, options), timeout=timeout)[0]


def run_all(*calls: tuple[Job, str | None, dict[str, Any]], timeout: float = 280.0) -> list[list[dict[str, Any]]]:
    """Carry out several jobs of equally many stages, one after the other, on the same ranks.

    Args:
        calls: the arguments of `train` for each: the job, the schedule, and a dict of the others by name.
        timeout: for all of them.

    Returns:
        For each call, what `train` returned, by stage.
    """
    results = ranks.run_ranks(_train_all, calls[0][0].stages, (calls,), timeout=timeout)
    return [list(by_stage) for by_stage in zip(*results, strict=True)]


def run_resumed(job: Job, rest: Job, folder: Path) -> list[list[dict[str, Any]]]:
    """Carry out a job that saves a checkpoint, and then another one that loads it first; as `run_all`."""
    return run_all((job, "paci", {"folder": str(folder)}), (rest, "paci", {"folder": str(folder), "load": True}))


def _train_all(calls: tuple[tuple[Job, str | None, dict[str, Any]], ...]) -> list[dict[str, Any]]:
    return [train(job, schedule, **options) for job, schedule, options in calls]


def cases(names: Iterable[str], slow: Collection[str]) -> list[Any]:
    """The names as parameters of a test, which is slow for some of them."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


class Runs:
    """Jobs with names; all those of equally many stages are carried out together, when the first of them is asked for.

    Args:
        jobs_by_name: the job, or the job and its schedule where that is not "paci".
        folder: for checkpoints, a folder below for each.
        slow: names of the jobs of slow tests, which are carried out apart from the others.
        options: of `train`, for every job.
    """

    def __init__(
        self,
        jobs_by_name: dict[str, Job | tuple[Job, str]],
        folder: Path,
        slow: Collection[str] = (),
        **options: Any,
    ) -> None:
        self._slow = slow
        self._jobs = {name: (job, "paci") if isinstance(job, Job) else job for name, job in jobs_by_name.items()}
        self._folder, self._options = folder, options
        self._results: dict[str, list[dict[str, Any]]] = {}

    def __getitem__(self, name: str) -> list[dict[str, Any]]:
        """What `train` returned, by stage."""
        if not versions.knows(self._jobs[name][0]):
            pytest.skip("the reference does not know how this DeepSpeed computes the job")
        if name not in self._results:
            stages, slow = self._jobs[name][0].stages, name in self._slow
            together = [
                other
                for other, (job, _) in self._jobs.items()
                if job.stages == stages and (other in self._slow) == slow and versions.knows(job)
            ]
            calls = [
                (*self._jobs[other], {"folder": str(self._folder / str(number)), **self._options})
                for number, other in enumerate(together)
            ]
            self._results.update(zip(together, run_all(*calls), strict=True))
        return self._results[name]


def assert_as_reference(job: Job, results: list[dict[str, Any]], *, rounding: float = 0.0, **options: Any) -> Reference:
    """Every stage at every moment as the reference, gradient norms included where the job clips.

    Args:
        job: what was carried out.
        results: by stage, what `train` returned.
        rounding: as of `assert_equal`.
        options: of the `Reference`.

    Returns:
        The reference, after the script.
    """
    reference = Reference(job, **options)
    expected = reference.run()
    assert_equal(results, expected, rounding=rounding)
    if job.clip:
        for stage, result in enumerate(results):
            truth = [moment.norm[stage] for moment in expected]
            found = [moment["norm"] for moment in result["moments"]]
            assert found == pytest.approx(truth, rel=max(2e-7, rounding), nan_ok=True), f"norms of stage {stage}"
    return reference


def assert_equal(
    results: list[dict[str, Any]], expected: list[Moment], *, counters: bool = True, rounding: float = 0.0
) -> None:
    """Every stage at every moment as the reference: weights with difference exactly 0, losses but for rounding.

    Args:
        results: by stage, what `train` returned.
        expected: the moments of the reference for the same script.
        counters: whether versions, drift and micro-batches in flight are compared too (what only PACI counts).
        rounding: how far weights may differ, and losses in proportion, where sums are taken in another order.
    """
    for stage, result in enumerate(results):
        assert result["stage"] == stage
        for number, (moment, truth) in enumerate(zip(result["moments"], expected, strict=True)):
            at = assert_moment(moment, truth, stage, number, rounding)
            if counters:
                stats, drift = moment["stats"], truth.drift[stage]
                counted = {
                    key: stats[key]
                    for key in (
                        "stage",
                        "stages",
                        "version",
                        "forwards",
                        "backwards",
                        "in_flight",
                        "peak_in_flight",
                        "max_drift",
                    )
                }
                assert counted == {
                    "stage": stage,
                    "stages": len(results),
                    "version": truth.version[stage],
                    "forwards": len(drift) + truth.live[stage],
                    "backwards": len(drift),
                    "in_flight": truth.live[stage],
                    "peak_in_flight": truth.peak[stage],
                    "max_drift": max(drift, default=0),
                }, at


def assert_moment(moment: dict[str, Any], truth: Moment, stage: int, number: int, rounding: float = 0.0) -> str:
    """One moment of a stage as the reference, as `assert_equal` says, counters left out; returns which one it is."""
    at = f"stage {stage} after action {number} ({truth.action})"
    assert moment["action"] == truth.action
    assert moment["weights"].keys() == truth.weights[stage].keys(), at
    for name, value in truth.weights[stage].items():
        difference = (moment["weights"][name].float() - value.float()).abs().max().item()
        assert difference <= rounding, f"{name} of {at} differs by {difference:.3g}"
    same = _same(moment["loss"], truth.loss[stage], max(3e-7, rounding))
    assert same, f"{at}: loss {moment['loss']}, not {truth.loss[stage]}"
    if not math.isnan(truth.rate[stage]):
        assert moment["rate"] == truth.rate[stage], f"{at}: rate {moment['rate']}, not {truth.rate[stage]}"
    return at


def _same(value: float, truth: float, rounding: float) -> bool:
    """Equal but for rounding, at least that of a mean in fp32; NaN where the truth is NaN."""
    return math.isnan(value) if math.isnan(truth) else math.isclose(value, truth, rel_tol=rounding)

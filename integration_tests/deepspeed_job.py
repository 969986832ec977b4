"""Carry out a job with DeepSpeed: what one rank does, and how to compare it with the reference.

The functions that run on a rank import DeepSpeed themselves, so that the process that compares needs no framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from integration_tests import jobs, ranks
from integration_tests.jobs import Job
from integration_tests.oracle import Moment

__all__ = ["act", "assert_equal", "build", "config", "follow", "run", "train", "weights"]


def config(job: Job, schedule: str | None) -> dict[str, Any]:
    """The DeepSpeed config of a job; `schedule` is "pipeline_schedule"; None and "stock" leave it and "paci" out."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": job.accumulation,
        "gradient_clipping": job.clip,
        "steps_per_print": None,
    }
    if job.precision != "fp32":
        settings["bf16"] = {"enabled": True}
    if job.precision == "bf16":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["zero_allow_untested_optimizer"] = True
        settings["zero_optimization"] = {"stage": 1, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}
    if schedule not in (None, "stock"):
        settings["pipeline_schedule"] = schedule
    if job.extra_in_flight:
        settings["paci"] = {"extra_in_flight": job.extra_in_flight}
    for key, value in job.config.items():
        both = isinstance(settings.get(key), dict) and isinstance(value, dict)
        settings[key] = {**settings[key], **value} if both else value
    if schedule in (None, "stock"):
        settings.pop("paci", None)
    return settings


def build(job: Job, schedule: str | None = "paci", **module_options: Any) -> Any:
    """The engine of this rank.  Registers the schedules unless `schedule` is "stock"."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    if schedule != "stock":
        import paci_schedule

        paci_schedule.register("deepspeed")
    deepspeed.init_distributed(verbose=False)
    options = {"num_stages": job.stages, "partition_method": "uniform", "loss_fn": jobs.loss, **module_options}
    module = PipelineModule(jobs.layers(job.model), **options)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=None if "optimizer" in job.config else jobs.optimizer(job),
        model_parameters=jobs.parameter_groups(job, parameters) if parameters else parameters,
        lr_scheduler=jobs.schedule(job),
        config=_by_stage(config(job, schedule)),
    )
    return engine


def _by_stage(settings: dict[str, Any]) -> dict[str, Any]:
    """Clipping by stage unless the job says otherwise, as the reference does."""
    options = settings.get("paci", {})
    wanted = "pipeline_schedule" in settings and isinstance(options, dict)
    return {**settings, "paci": {"clip": "stage", **options}} if wanted else settings


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
    name, _, number = action.partition("=")
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
    elif name == "accumulate":
        engine.set_train_batch_size(int(number) * engine.train_micro_batch_size_per_gpu())
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
        As `follow`, and "inspected": what `inspect` says about the engine at the end.
    """
    engine = build(job, schedule)
    if load:
        path, _ = engine.load_checkpoint(folder, tag="common")
        assert path is not None
    return {**follow(engine, job, schedule, folder), "inspected": inspect and inspect(engine)}


def follow(engine: Any, job: Job, schedule: str | None, folder: str | None) -> dict[str, Any]:
    """Carry out the script of a job.

    Returns:
        "stage"; "moments": this stage's part of every `Moment`; "pulled": after every action, the micro-batches pulled
        from the iterator so far.
    """
    feed = Feed(jobs.data(job.model, job.first_micro_batch))
    moments, pulled = [], []
    for action in job.actions():
        moments.append(_moment(engine, action, act(engine, job, action, feed, folder), schedule))
        pulled.append(feed.pulled)
    return {"moments": moments, "pulled": pulled, "stage": engine.stage_id}


def _moment(engine: Any, action: str, loss: float, schedule: str | None) -> dict[str, Any]:
    stats = engine.pipeline_stats() if hasattr(engine, "pipeline_stats") else {"version": engine.global_steps}
    return {"action": action, "loss": loss, "weights": weights(engine), "stats": stats, "rate": engine.get_lr()[0]}


def run(job: Job, schedule: str | None = "paci", *, timeout: float = 120.0, **options: Any) -> list[dict[str, Any]]:
    """Carry out a job on as many ranks as it has stages; what `train` returned, by stage."""
    return ranks.run_ranks(_train, job.stages, (job, schedule, options), timeout=timeout)


def _train(job: Job, schedule: str | None, options: dict[str, Any]) -> dict[str, Any]:
    return train(job, schedule, **options)


def assert_equal(
    results: list[dict[str, Any]], expected: list[Moment], *, counters: bool = True, rounding: float = 0.0
) -> None:
    """Every stage at every moment as the reference: weights with difference exactly 0, losses but for rounding.

    Args:
        results: by stage, what `train` returned.
        expected: what `oracle.run` returned for the same script.
        counters: whether versions, drift and micro-batches in flight are compared too (what only PACI counts).
        rounding: how far weights may differ, and losses in proportion, where sums are taken in another order.
    """
    for stage, result in enumerate(results):
        assert result["stage"] == stage
        for number, (moment, truth) in enumerate(zip(result["moments"], expected, strict=True)):
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


def _same(value: float, truth: float, rounding: float) -> bool:
    """Equal but for rounding, at least that of a mean in fp32; NaN where the truth is NaN."""
    return math.isnan(value) if math.isnan(truth) else math.isclose(value, truth, rel_tol=rounding)

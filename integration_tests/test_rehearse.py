"""A rehearsal is the engine's training: weights with difference 0 and the same losses, without a single message."""

import math

import pytest
from torch import nn

from paci_schedule.rehearse import rehearse
from testing import deepspeed_job, jobs
from testing.jobs import Job

PACI = ("train x5", "drain")
FLUSH = ("schedule=1f1b", "train x4")
SLACK = {"paci": {"extra_in_flight": 2}}
WARM_UP = {"paci": {"flush_warmup_steps": 2}}
WARM_PREDICTED = {"paci": {"flush_warmup_steps": 2, "prediction": "every", "prediction_reach": 1.5}}

JOBS = {
    "P=2 a=1": Job(stages=2, accumulation=1, script=PACI, warmup=True),
    "P=2 a=2, clipping": Job(stages=2, accumulation=2, script=PACI, clip=0.6, warmup=True, optimizer="groups"),
    "P=2 a=3, slack, clipping": Job(stages=2, accumulation=3, script=PACI, clip=0.6, config=SLACK),
    "P=2 a=4": Job(stages=2, accumulation=4, script=PACI, optimizer="adam"),
    "P=2 a=3, flush": Job(stages=2, accumulation=3, script=FLUSH, warmup=True),
    "P=2 a=2, flush, clipping": Job(stages=2, accumulation=2, script=FLUSH, clip=0.6, warmup=True),
    "P=2 a=2, tuples, clipping": Job(stages=2, accumulation=2, script=PACI, model="pairs", clip=1.4),
    "P=2 a=3, flushed warm-up, clipping": Job(stages=2, accumulation=3, script=PACI, clip=0.6, config=WARM_UP),
    "P=3 a=1, clipping": Job(stages=3, accumulation=1, script=PACI, clip=0.9, optimizer="sgd"),
    "P=3 a=2": Job(stages=3, accumulation=2, script=PACI, warmup=True),
    "P=3 a=2, slack, clipping": Job(stages=3, accumulation=2, script=PACI, clip=0.6, config=SLACK),
    "P=3 a=3, clipping": Job(stages=3, accumulation=3, script=PACI, clip=0.6, warmup=True),
    "P=3 a=2, a stage without parameters": Job(stages=3, accumulation=2, script=PACI, model="hollow", clip=0.4),
    "P=3 a=2, a frozen stage": Job(stages=3, accumulation=2, script=PACI, model="frozen", clip=0.6),
    "P=3 a=4, flush": Job(stages=3, accumulation=4, script=FLUSH, optimizer="groups"),
    "P=4 a=1, slack": Job(stages=4, accumulation=1, script=PACI, config=SLACK),
    "P=4 a=2, clipping": Job(stages=4, accumulation=2, script=PACI, clip=0.7, warmup=True),
    "P=4 a=3": Job(stages=4, accumulation=3, script=PACI, warmup=True),
    "P=4 a=4, clipping": Job(stages=4, accumulation=4, script=PACI, clip=0.6),
    "P=4 a=2, flushed warm-up, clipping": Job(stages=4, accumulation=2, script=PACI, clip=0.6, config=WARM_UP),
    "P=3 a=3, flushed warm-up, prediction, clipping": Job(
        stages=3, accumulation=3, script=PACI, clip=0.6, warmup=True, optimizer="adam", config=WARM_PREDICTED
    ),
    "P=4 a=2, flush": Job(stages=4, accumulation=2, script=FLUSH, warmup=True),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return deepspeed_job.Runs(JOBS, tmp_path_factory.mktemp("rehearse"))


def rehearsed(job, look=lambda stages: None):
    """The stages after the job, by rehearsal, and the updates; `look` sees the stages after each of these."""
    layers = jobs.layers(job.model)
    stages = [nn.Sequential(*(layers[number] for number in job.stage_layers(stage))) for stage in range(job.stages)]
    optimizers, schedulers = [], []
    for stage in stages:
        trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        optimizers.append([jobs.optimizer(job)(jobs.parameter_groups(job, trained))] if trained else [])
        schedulers.append([jobs.schedule(job)(each) for each in optimizers[-1]] if job.warmup else [])
    data = jobs.data(job.model)
    count = [*job.actions()].count("train")
    batches = ([next(data) for _ in range(job.accumulation)] for _ in range(count))
    updates = []
    for update in rehearse(
        stages,
        optimizers,
        jobs.loss,
        batches,
        schedule="flush" if job.script == FLUSH else "paci",
        accumulation=job.accumulation,
        extra_in_flight=job.options.get("extra_in_flight", 0),
        clip=job.clip,
        prediction=job.options.get("prediction", "off"),
        prediction_reach=job.options.get("prediction_reach", 1.0),
        flush_warmup_steps=job.options.get("flush_warmup_steps", 0),
        schedulers=schedulers,
    ):
        updates.append(update)
        look(stages)
    return stages, updates


@pytest.mark.parametrize("name", JOBS)
def test_a_rehearsal_trains_as_the_engine(name, runs):
    job, results = JOBS[name], runs[name]
    stages, updates = rehearsed(job)
    for number, (stage, result) in enumerate(zip(stages, results, strict=True)):
        moment = result["moments"][-1]
        found = {
            f"{job.stage_layers(number).start + place}.{key}": value
            for place, layer in enumerate(stage)
            for key, value in layer.named_parameters()
        }
        assert found.keys() == moment["weights"].keys()
        for key, value in found.items():
            difference = (value - moment["weights"][key]).abs().max().item()
            assert difference == 0, f"{key} of stage {number} differs by {difference:.3g}"
        if job.script == PACI:
            assert updates[-1].drift[number] == result["moments"][-2]["stats"]["max_drift"]
    losses = [moment["loss"] for moment in results[-1]["moments"] if moment["action"] == "train"]
    for update, loss in zip(updates, losses, strict=True):
        assert math.isclose(update.loss, loss, rel_tol=3e-7)

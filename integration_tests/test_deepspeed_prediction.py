"""Predicted weights in the engine: as a rehearsal predicts, and as steps on copies of the masters do; never shown."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from integration_tests import deepspeed_job, jobs, late_job, oracle
from integration_tests.jobs import Job
from integration_tests.test_rehearse import rehearsed
from paci_schedule.drift import drift_of
from paci_schedule.spec import PipelineSpec

PACI = ("train x5", "drain")
MIXED = ("train x3", "drain", "train x2", "eval", "train x3", "save", "train x2", "drain")


def predicting(prediction, stages, accumulation, script=PACI, extra_in_flight=0, **more):
    paci = {"prediction": prediction, "extra_in_flight": extra_in_flight}
    return Job(stages=stages, accumulation=accumulation, script=script, config={"paci": paci}, **more)


# ---- as a rehearsal --------------------------------------------------------------------------------------------------

JOBS = {
    "P=2 a=1, every, Adam": predicting("every", 2, 1, optimizer="adam", warmup=True),
    "P=2 a=2, window, NAdam": predicting("window", 2, 2, optimizer="nadam", clip=0.6),
    "P=2 a=3, every, slack, groups": predicting("every", 2, 3, extra_in_flight=2, optimizer="groups", clip=0.6),
    "P=2 a=4, every second, slack": predicting(2, 2, 4, extra_in_flight=3, warmup=True),
    "P=3 a=1, window, SGD": predicting("window", 3, 1, optimizer="sgd", clip=0.9),
    "P=3 a=2, every, SGD": predicting("every", 3, 2, optimizer="sgd", warmup=True),
    "P=3 a=3, window, a stage without parameters": predicting("window", 3, 3, model="hollow", clip=0.4),
    "P=3 a=2, window, tuples": predicting("window", 3, 2, model="pairs", clip=1.4),
    "P=4 a=1, every second, NAdam": predicting(2, 4, 1, optimizer="nadam"),
    "P=4 a=2, every third, slack": predicting(3, 4, 2, extra_in_flight=2, clip=0.7, warmup=True),
    "P=4 a=3, window, groups": predicting("window", 4, 3, optimizer="groups", clip=0.6, warmup=True),
    "P=4 a=4, every": predicting("every", 4, 4, clip=0.6),
}
if hasattr(torch.optim, "Muon"):
    JOBS["P=4 a=2, window, Muon"] = predicting("window", 4, 2, model="matrices", optimizer="muon", clip=0.7)
    JOBS["P=2 a=2, every, Muon"] = predicting("every", 2, 2, model="matrices", optimizer="muon")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return late_job.Runs({name: (job,) for name, job in JOBS.items()}, tmp_path_factory.mktemp("predictions"))


@pytest.mark.parametrize("name", JOBS)
def test_the_engine_predicts_as_a_rehearsal(name, runs):
    job, results, shown = JOBS[name], runs[name], []
    stages, _ = rehearsed(job, lambda stages: shown.append([weights_of(job, *each) for each in enumerate(stages)]))
    shown.append([weights_of(job, *each) for each in enumerate(stages)])
    for number, result in enumerate(results):
        assert len(result["moments"]) == len(shown)
        for moment, truth in zip(result["moments"], shown, strict=True):
            assert moment["weights"].keys() == truth[number].keys()
            for key, value in truth[number].items():
                difference = (value - moment["weights"][key]).abs().max().item()
                assert difference == 0, f"{key} of stage {number} after {moment['action']} differs by {difference:.3g}"


@pytest.mark.parametrize("name", JOBS)
def test_it_counts_its_predictions(name, runs):
    """Where something is trained: at every stale forward, or at those of them that the option names."""
    job = JOBS[name]
    asked = late_job.options(job)["prediction"]
    spec = PipelineSpec(stages=job.stages, accumulation=job.accumulation,
                        extra_in_flight=late_job.options(job)["extra_in_flight"])
    for stage, result in enumerate(runs[name]):
        between = {}  # updates done before the forward -> stale forwards
        for micro_batch in range(5 * job.accumulation):
            if drift_of(spec, stage, micro_batch):
                done = max(0, micro_batch - spec.look_ahead(stage)) // job.accumulation
                between[done] = between.get(done, 0) + 1
        counts = {"every": between.values(), "window": [1] * len(between)}
        expected = counts[asked] if asked in counts else [-(-stale // asked) for stale in between.values()]
        assert result["moments"][-1]["stats"]["predictions"] == sum(expected)


def test_predictions_change_the_training(runs):
    """The jobs above would not tell a prediction that never happened from none, were it not for this."""
    for name, job in JOBS.items():
        stages, _ = rehearsed(dataclasses.replace(job, config={"paci": {
            **late_job.options(job), "prediction": "off"}}))
        found = weights_of(job, 0, stages[0])
        assert any((found[key] != value).any() for key, value in runs[name][0]["moments"][-1]["weights"].items())


def weights_of(job, stage, module):
    first = job.stage_layers(stage).start
    return {f"{first + place}.{key}": value.detach().clone()
            for place, layer in enumerate(module) for key, value in layer.named_parameters()}


# ---- as steps on copies, with masters, replicas and everything that comes between batches ----------------------------


class PredictingReference(oracle.Reference):
    """The reference, whose stale forwards run on the weights that new optimizers' steps leave."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.stages = [_PredictingStage(self, job, number) for number in range(job.stages)]

    def _drain(self) -> None:
        super()._drain()
        for stage in self.stages:
            stage.emptied = stage.version


class _PredictingStage(oracle._Stage):
    def __init__(self, pipe: PredictingReference, job: Job, number: int) -> None:
        super().__init__(job, number, jobs.layers(job.model))
        self._pipe, self._asked = pipe, job.config["paci"]["prediction"]
        self._job = job
        self.emptied = 0
        self._stale = 0
        self._real = None

    def forward(self, index, batch, labels):
        ahead = index // self._pipe._accumulation - (self.version - self.emptied)
        interval = {"every": 1, "window": 1 << 30}.get(self._asked, self._asked)
        if ahead and self._updater.optimizer:
            if self._stale % interval == 0:
                self._predict(ahead)
            self._stale += 1
        try:
            return super().forward(index, batch, labels)
        finally:
            if interval == 1:
                self._restore()

    def step(self):
        self._restore()
        self._stale = 0
        super().step()

    def weights(self):
        predicted = [weight.detach().clone() for weight in self.module.parameters()]
        kept, self._real = self._real, self._real
        self._restore()
        try:
            return super().weights()
        finally:
            if kept is not None:
                self._real = kept
                self._write(self.module.parameters(), predicted)

    def _restore(self):
        if self._real is not None:
            self._write(self.module.parameters(), self._real)
            self._real = None

    @staticmethod
    def _write(weights, values):
        for weight, value in zip(weights, values, strict=True):
            weight.data.copy_(value)

    def _predict(self, ahead):
        """Steps of an optimizer of its own, on copies, with the part for a gradient or what Adam's momentum expects."""
        self._restore()
        self._real = [weight.detach().clone() for weight in self.module.parameters()]
        updater, done = self._updater, len(self.window)
        optimizer = jobs.optimizer(self._job)([
            {**group, "params": [weight.detach().clone() for weight in group["params"]]}
            for group in updater.optimizer.param_groups])
        optimizer.load_state_dict(copy.deepcopy(updater.optimizer.state_dict()))  # else it shares the tensors
        copies = [weight for group in optimizer.param_groups for weight in group["params"]]
        originals = [weight for group in updater.optimizer.param_groups for weight in group["params"]]
        flat = {id(master): total for _, master, total in getattr(updater, "_flat", ())}
        for _ in range(ahead):
            for weight, original in zip(copies, originals, strict=True):
                state = updater.optimizer.state.get(original)
                if done:
                    total = flat.get(id(original), original.grad)
                    weight.grad = None if total is None else total.float() * (self._pipe._accumulation / done)
                    if updater.factors and weight.grad is not None:
                        weight.grad.mul_(torch.tensor(updater.factors[-1]).clamp(max=1.0))
                elif state:
                    beta = updater.optimizer.param_groups[0]["betas"][0]
                    weight.grad = state["exp_avg"] / (1 - beta ** state["step"])
            optimizer.step()
        if not flat:
            self._write(originals, copies)
        for (parameters, _, _), predicted in zip(getattr(updater, "_flat", ()), copies, strict=False):
            pieces = updater._pieces(parameters, predicted)
            self._write(parameters, [piece.view_as(weight) for weight, piece in zip(parameters, pieces, strict=True)])


REFERENCED = {
    "fp32, every": predicting("every", 3, 2, MIXED, warmup=True),
    "fp32, window, clipping": predicting("window", 3, 1, MIXED, clip=0.4),
    "bf16, every": predicting("every", 3, 3, MIXED, precision="bf16", warmup=True),
    "bf16, window, clipping": predicting("window", 3, 2, MIXED, precision="bf16", clip=0.4, optimizer="groups"),
    "bf16, every second": predicting(2, 3, 1, MIXED, precision="bf16", clip=0.4),
    "bf16, window, a stage without parameters": predicting("window", 3, 3, MIXED, model="hollow", precision="bf16"),
    "bf16 sums, every third": predicting(3, 3, 4, MIXED, precision="bf16-bf16"),
    "accumulation changes on the way": predicting("every", 3, 3, ("train x3", "accumulate=1", "train x4", "drain"),
                                                  precision="bf16"),
}
REFERENCED = {name: dataclasses.replace(job, config={"paci": {**job.config["paci"], "clip": "stage"}})
              for name, job in REFERENCED.items()}


@pytest.fixture(scope="module")
def referenced(tmp_path_factory):
    return late_job.Runs({name: (job,) for name, job in REFERENCED.items()}, tmp_path_factory.mktemp("references"))


@pytest.mark.parametrize("name", REFERENCED)
def test_the_engine_predicts_as_steps_on_copies(name, referenced):
    deepspeed_job.assert_equal(referenced[name], PredictingReference(REFERENCED[name]).run())


@pytest.mark.parametrize("name", REFERENCED)
def test_the_reference_with_predictions_is_another_training(name):
    """Were it not, the comparison would say nothing."""
    job = REFERENCED[name]
    last = [reference(job).run()[-1].weights for reference in (PredictingReference, oracle.Reference)]
    assert any((one[key] != other[key]).any() for one, other in zip(*last, strict=True) for key in one)

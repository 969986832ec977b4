"""A rehearsal of megatron-core's own GPT is Megatron's training under the schedule: weights with difference 0."""

import pytest
import torch
from torch import nn

from paci_schedule.rehearse import rehearse
from testing import ranks
from testing.megatron_job import prepare, train_all
from testing.megatron_model import SEQUENCE, GptJob, build, micro_batch, set_up

JOBS = [
    GptJob(stages=2, accumulation=1),
    GptJob(stages=2, accumulation=3),
    GptJob(stages=2, accumulation=2, schedule="1f1b"),
    GptJob(stages=2, accumulation=1, paci={"prediction": "every"}),
    GptJob(stages=2, accumulation=3, paci={"prediction": "window", "train_iters": 5}),
]


class Chunk(nn.Module):
    """A stage's GPTModel as a module of one argument: tokens, or what the stage before has put out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        if x.is_floating_point():
            self.model.set_input_tensor(x)
            return self.model(None, None, None)
        return self.model(x, torch.arange(SEQUENCE, device=x.device).expand_as(x), None)


def rehearsed(jobs):
    """For every job, by stage, name -> weight."""
    prepare()
    results = []
    for job in jobs:
        set_up(GptJob(stages=1))
        stages, optimizers = [], []
        for number in range(job.stages):
            wrapped, optimizer = build(job, number, job.stages, 1)
            stage, twin = wrapped.module, {}
            for part in stage.modules():  # Megatron's DDP has hooked the parameters, and takes their gradients away
                for name, old in part.named_parameters(recurse=False):
                    twin[old] = nn.Parameter(old.detach().clone())
                    setattr(part, name, twin[old])
            inner = optimizer.chained_optimizers[0].optimizer
            groups = [{**group, "params": [twin[each] for each in group["params"]]} for group in inner.param_groups]
            stages.append(Chunk(stage))
            optimizers.append(type(inner)(groups, lr=job.lr))
        last = stages[-1].model

        def loss_fn(logits, labels, last=last):
            return last.compute_language_model_loss(labels, logits.transpose(0, 1).contiguous()).float().mean()

        data = [micro_batch(index, 0) for index in range(job.calls * job.accumulation)]
        pairs = [(tokens[:, :-1], tokens[:, 1:]) for tokens in data]
        batches = [pairs[at : at + job.accumulation] for at in range(0, len(pairs), job.accumulation)]
        updates = list(
            rehearse(
                stages,
                optimizers,
                loss_fn,
                batches,
                accumulation=job.accumulation,
                schedule="flush" if job.schedule == "1f1b" else "paci",
                prediction=job.paci.get("prediction", "off"),
            )
        )
        weights = [{name: value.detach() for name, value in stage.model.named_parameters()} for stage in stages]
        results.append((weights, [update.loss for update in updates]))
    return results


@pytest.fixture(scope="module")
def expected():
    return list(zip(*ranks.run_ranks(train_all, 2, (JOBS,), timeout=280.0), strict=True))


@pytest.fixture(scope="module")
def found():
    return ranks.run_ranks(rehearsed, 1, (JOBS,), timeout=280.0)[0]


@pytest.mark.parametrize(
    "number", range(len(JOBS)), ids=["P=2 a=1", "P=2 a=3", "P=2 a=2, flush", "P=2 a=1, every", "P=2 a=3, window"]
)
def test_a_rehearsal_of_megatrons_gpt_is_megatrons_training(number, found, expected):
    weights, losses = found[number]
    for stage, (values, trained) in enumerate(zip(weights, expected[number], strict=True)):
        assert values.keys() == trained.weights.keys()
        for name, value in values.items():
            assert torch.equal(value, trained.weights[name]), f"{name} of stage {stage}"
    truth = [sum(call) / len(call) for call in expected[number][-1].losses]
    assert losses == pytest.approx(truth, rel=3e-7)

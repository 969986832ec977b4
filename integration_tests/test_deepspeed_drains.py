"""Training loops that call, before every batch, what may drain the pipe: what nothing changes drains nothing, what
drains loses no loss, and a loop that drains before every batch is warned."""

import pytest
import torch

from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job

BATCHES = 5
JOB = Job(stages=2, accumulation=4, script=())


def train_calling(engine, call):
    """Train, with `call(engine, number)` before every batch.

    Returns:
        The losses that `train_batch` returned, and a last `drain`; the micro-batches that were in flight at each batch;
        the losses of all micro-batches in order, at the last stage; the weights.
    """
    feed, told, live, known = jobs.data(JOB.model), [], [], []
    loss_of = engine.module.loss_fn

    def noted(outputs, labels):
        loss = loss_of(outputs, labels)
        known.append(loss.item())
        return loss

    engine.module.loss_fn = noted
    for number in range(BATCHES):
        call(engine, number)
        live.append(engine.pipeline_stats()["in_flight"])
        told.append(engine.train_batch(feed).item())
    told.append(engine.drain().item())
    return told, live, known, deepspeed_job.weights(engine)


def say_the_same(engine, number):
    engine.set_train_batch_size(engine.train_batch_size())
    engine.set_train_micro_batch_size(engine.train_micro_batch_size_per_gpu())


def say_another(engine, number):
    """Twice as many micro-batches in every other batch."""
    engine.set_train_batch_size(12 * (1 + number % 2))


def train_in_three_ways(job):
    calls = (lambda engine, number: None, say_the_same, say_another)
    return [train_calling(deepspeed_job.build(job), call) for call in calls]


@pytest.fixture(scope="module")
def outcomes():
    found = ranks.gather_outcomes(train_in_three_ways, 2, (JOB,))
    assert [outcome.ended for outcome in found] == ["returned"] * 2, found
    return found


def test_what_changes_nothing_drains_nothing(outcomes):
    for stage, outcome in enumerate(outcomes):
        (told, live, _, weights), (told_too, live_too, _, weights_too), _ = outcome.value
        assert live == live_too == [0] + [1 - stage] * (BATCHES - 1)
        assert told[: BATCHES + (stage == 0)] == told_too[: BATCHES + (stage == 0)]
        assert all(torch.equal(weights[name], value) for name, value in weights_too.items())


def test_a_drain_by_another_method_loses_no_loss(outcomes):
    """The first stage is told of 3 micro-batches, then of one of the batch before and of all but one of this one."""
    (first, *_), (last, _, known, _) = outcomes[0].value[2], outcomes[1].value[2]
    sizes = [4 * (1 + number % 2) for number in range(BATCHES)]
    ends = [sum(sizes[: number + 1]) for number in range(BATCHES)]
    assert len(known) == ends[-1]
    starts = [0, *ends[:-1]]
    assert last[:-1] == pytest.approx([sum(known[a:b]) / (b - a) for a, b in zip(starts, ends, strict=True)], rel=1e-6)
    starts, ends = [0, *(end - 1 for end in ends)], [*(end - 1 for end in ends), ends[-1]]
    assert first == pytest.approx([sum(known[a:b]) / (b - a) for a, b in zip(starts, ends, strict=True)], rel=1e-6)


def test_a_loop_that_drains_before_every_batch_is_warned_once_on_rank_0(outcomes):
    warnings = [outcome.output.count("has emptied the pipe before each of the last 3 batches") for outcome in outcomes]
    assert warnings == [1, 0]
    assert "engine.set_train_batch_size()" in outcomes[0].output

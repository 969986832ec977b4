"""Shapes that change from batch to batch, or within a batch: as the reference on the same micro-batches."""

import dataclasses
from unittest import mock

import pytest
import torch
from torch import nn

from paci_schedule.runtime.message import Layout
from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference.deepspeed import Reference

MIXED = ("train x5", "drain", "train x4", "eval", "train x4")
BY_BATCH = tuple(shape for shape in ((3, 5), (3, 2), (2, 4), (3, 5), (1, 3)) for _ in range(2))
WITHIN = ((3, 5), (2, 3), (3, 1), (1, 5), (2, 2))  # a prime number of them

JOBS = {
    "lengths, clipped": Job(stages=3, accumulation=2, script=MIXED, shapes=BY_BATCH, clip=0.6, warmup=True),
    "reset before every batch": Job(stages=3, accumulation=2, script=("reset", "train") * 7, shapes=BY_BATCH),
    "tuples, bf16, within a batch": Job(
        stages=3, accumulation=3, script=MIXED, shapes=WITHIN, model="pairs", precision="bf16", clip=0.6
    ),
    "tied, slack, early receives": Job(
        stages=3,
        accumulation=2,
        script=MIXED,
        shapes=WITHIN,
        model="tied",
        config={"paci": {"extra_in_flight": [0, 2], "early_receives": True}},
    ),
    "flushed, slack, early receives": Job(
        stages=3,
        accumulation=2,
        script=("train x2", "schedule=1f1b", "train x2", "schedule=paci", "train x2"),
        shapes=WITHIN,
        config={"paci": {"extra_in_flight": 2, "early_receives": True}},
    ),
    "predicted, a=1": Job(
        stages=3, accumulation=1, script=MIXED, shapes=WITHIN, config={"paci": {"prediction": "every"}}
    ),
    "other accumulations, P=3": Job(
        stages=3, accumulation=1, script=("train x3", "accumulate=4", "train x3"), shapes=WITHIN, optimizer="sgd"
    ),
}
BEFORE = Job(stages=3, accumulation=2, script=("train x5", "save"), shapes=BY_BATCH)
AFTER = dataclasses.replace(BEFORE, script=("train x3", "drain"), first_micro_batch=10)


def learnt(engine):
    """How many layouts this stage sends and receives activations and gradients in."""
    links = engine._assembly.links
    return [len(box._layouts) for box in (*links._inboxes.values(), *links._outboxes.values())]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = {"folder": str(tmp_path_factory.mktemp("shapes"))}
    calls = {name: (job, "paci", {"inspect": learnt}) for name, job in JOBS.items()}
    calls |= {"before": (BEFORE, "paci", folder), "after": (AFTER, "paci", {**folder, "load": True})}
    return dict(zip(calls, deepspeed_job.run_all(*calls.values()), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_shapes_that_change_train_as_the_reference(name, runs):
    """With the micro-batches in flight that the reference counts: no stage has drained because of a shape."""
    deepspeed_job.assert_as_reference(JOBS[name], runs[name])


@pytest.mark.parametrize("name", JOBS)
def test_every_link_learns_each_shape_once(name, runs):
    for stage, result in enumerate(runs[name]):
        assert set(result["inspected"]) == {len(set(JOBS[name].shapes))}, f"stage {stage}"


def test_a_resumed_run_goes_on_with_other_shapes(runs):
    expected = Reference(dataclasses.replace(BEFORE, script=(*BEFORE.script, *AFTER.script))).run()
    deepspeed_job.assert_equal(runs["after"], expected[-len(list(AFTER.actions())) :], counters=False)


# ---- beside stock, with a function that changes the data, and where shapes do not follow from the data ---------------

SHORT = Job(stages=2, accumulation=2, script=("train x4",), shapes=WITHIN)
NAMED = pytest.mark.skipif(ranks.backend(2) != "gloo", reason="on NCCL nothing is raised: its watchdog ends the job")


class Fading(nn.Module):
    """Passes on one place less after so many calls."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def forward(self, x):
        self.left -= 1
        return x if self.left >= 0 else x[:, :-1]


def shorten(batch):
    """What a curriculum does: the data iterator gives whole micro-batches, and half of their length is used."""
    (ids, labels) = batch
    return ids[:, :3], labels[:, :3]


def fade(job, after, *calls):
    """Batches of whole inputs, whose labels are as short as what the model makes of them after so many calls."""
    layers = jobs.layers(job.model)
    engine = deepspeed_job.build(job, layers=[*layers[:5], Fading(after), *layers[5:]])
    feed = ((ids, labels[:, : 5 - (index >= after)]) for index, (ids, labels) in enumerate(jobs.data(job.model)))
    headers = mock.patch.object(Layout, "header", autospec=True, side_effect=Layout.header)
    with headers as sent:
        for call in calls:
            getattr(engine, call)(*[feed] * (call == "train_batch"))
    return sent.call_count


def train_beside_stock():
    """Losses and weights, of stock and of a flush, of data shortened by a function or before; a number of headers."""
    calls = ["train_batch", "drain", "reset_activation_shape", "train_batch", "train_batch", "drain"]
    found = {"headers": fade(SHORT, 2, *calls)}
    for name in ("stock", "1f1b"):
        engine = deepspeed_job.build(SHORT, "stock" if name == "stock" else "paci")
        if name != "stock":
            engine.set_pipeline_schedule(name)
        feed = jobs.data(SHORT.model, shapes=SHORT.shapes)
        found[name] = [engine.train_batch(feed).item() for _ in range(4)], deepspeed_job.weights(engine)

    job = dataclasses.replace(SHORT, shapes=())
    for name in ("by a function", "before"):
        engine = deepspeed_job.build(job)
        feed, losses = jobs.data(job.model), []
        for batch in range(5):
            engine.set_batch_fn(shorten if name == "by a function" and batch in (1, 2) else None)
            two = [next(feed) for _ in range(2)]
            losses.append(engine.train_batch(iter(map(shorten, two) if name == "before" and batch in (1, 2) else two)))
        engine.drain()
        found[name] = torch.stack(losses[1:]).tolist(), deepspeed_job.weights(engine)

    return found


@pytest.fixture(scope="module")
def beside_stock():
    return ranks.run_ranks(train_beside_stock, 2, (), timeout=120)


def test_under_a_flush_they_train_as_under_stock(beside_stock):
    for found in beside_stock:
        (losses, weights), (truth, stock) = found["1f1b"], found["stock"]
        assert losses == pytest.approx(truth, rel=3e-7)
        assert all(torch.equal(weights[name], value) for name, value in stock.items())


def test_a_function_that_changes_the_data_may_change_its_shapes(beside_stock):
    for found in beside_stock:
        (losses, weights), (truth, same) = found["by a function"], found["before"]
        assert losses == truth
        assert all(torch.equal(weights[name], value) for name, value in same.items())


def test_shapes_that_do_not_follow_from_the_data_are_learnt_anew_where_the_pipe_is_empty(beside_stock):
    assert [found["headers"] for found in beside_stock] == [2, 2]


@NAMED
def test_else_they_are_an_error_that_names_both():
    job = dataclasses.replace(SHORT, config={"paci": {"timeout": 5}})
    outcomes = ranks.gather_outcomes(fade, 2, (job, 3, *["train_batch"] * 3), timeout=60)
    assert [outcome.raised[0] for outcome in outcomes] == ["ConfigError", "LinkError"]
    for words in ("micro-batch 3", "float32[3, 4, ", "float32[3, 5, ", "drain", "reset_activation_shape"):
        assert words in outcomes[0].error

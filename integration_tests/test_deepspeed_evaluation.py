"""What is done with a model beside training it, as users call it: evaluation, the engine's own loader, exports."""

import argparse
import contextlib
import dataclasses
import multiprocessing

import pytest
import torch
import torch.distributed as dist

from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference import deepspeed as reference

JOB = Job(stages=2, accumulation=2, script=("train x2",), precision="bf16")

EVALUATIONS = {
    "as it is": {},
    "more micro-batches": {"num_micro_batches": 5},
    "one micro-batch": {"num_micro_batches": 1},
    "with logits": {"return_logits": True},
    "not reduced": {"reduce_output": None, "bcast_loss": False},
    "reduced, not told": {"bcast_loss": False},
    "outputs alone": {"compute_loss": False, "reduce_output": None},
    "outputs and logits": {"compute_loss": False, "reduce_output": None, "return_logits": True, "num_micro_batches": 3},
}


def use(job, folder):
    """By schedule, both of 1F1B's arithmetic: every evaluation after two batches, and a saved checkpoint."""
    told = {}
    for schedule in ("stock", "paci"):
        engine = deepspeed_job.build(job, schedule)
        if schedule == "paci":
            engine.set_pipeline_schedule("1f1b")
        deepspeed_job.follow(engine, job)
        told[schedule] = {}
        for name, options in EVALUATIONS.items():
            if schedule == "stock":
                engine.total_loss = None  # else it adds the outputs of an evaluation without loss to the last loss
            told[schedule][name] = engine.eval_batch(jobs.data(job.model, jobs.EVALUATION_DATA), **options)
        engine.save_checkpoint(f"{folder}/{schedule}", tag="end")
        dist.barrier()
        if engine.is_first_stage():
            make_universal(f"{folder}/{schedule}")
    dist.barrier()
    resumed = dataclasses.replace(job, config={"checkpoint": {"load_universal": True}})
    for schedule in ("stock", "paci"):
        engine = deepspeed_job.build(resumed, schedule)
        if schedule == "paci":
            engine.set_pipeline_schedule("1f1b")
        engine.load_checkpoint(f"{folder}/stock", tag="universal")
        deepspeed_job.follow(engine, job)
        told[f"{schedule} from a universal checkpoint"] = deepspeed_job.weights(engine)
    return told


def make_universal(folder):
    """Convert the checkpoint "end" with DeepSpeed's own tool."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    places = {"input_folder": f"{folder}/end", "output_folder": f"{folder}/universal", "inject_missing_state": True}
    with contextlib.redirect_stdout(None):
        ds_to_universal.main(argparse.Namespace(**arguments, **places))


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return folder, ranks.run_ranks(use, 2, (JOB, str(folder)))


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_returns_what_stock_returns(name, used):
    for told in used[1]:
        assert flat(told["paci"][name]) == flat(told["stock"][name])


def flat(value):
    """The same, with tensors as lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [flat(each) for each in value] if isinstance(value, list | tuple) else value


def tensors(value, path=""):
    """Every tensor inside a checkpoint's file, by its path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: each for key, below in items for name, each in tensors(below, f"{path}/{key}").items()}


@pytest.mark.parametrize("kind", ["end", "universal"])
def test_a_checkpoint_has_the_files_and_tensors_of_stock(kind, used):
    """So whatever reads one, such as a conversion to other weights, reads the other."""
    roots = [used[0] / schedule / kind for schedule in ("stock", "paci")]
    files = [sorted(str(path.relative_to(root)) for path in root.rglob("*.pt")) for root in roots]
    assert files[0] == files[1]
    assert len(files[0]) > 2 * jobs.LAYERS if kind == "universal" else len(files[0]) >= jobs.LAYERS + 4
    for name in files[0]:
        stock, paci = (tensors(torch.load(root / name, weights_only=False)) for root in roots)
        ours = {path for path in paci if path.startswith("/paci_schedule/")}
        assert stock.keys() == paci.keys() - ours, name
        assert all(torch.equal(value, paci[path]) for path, value in stock.items()), name


def test_a_universal_checkpoint_loads_as_under_stock(used):
    for told in used[1]:
        stock, paci = (told[f"{schedule} from a universal checkpoint"] for schedule in ("stock", "paci"))
        assert all(torch.equal(paci[name], value) for name, value in stock.items())


# ---- data: the engine's own loader, a curriculum; a module without an optimizer --------------------------------------

DATA = Job(stages=2, accumulation=2, script=("train x3", "drain", "train"))


def feed_in_other_ways(job):
    """What `train_on_own_loader`, `train_on_a_curriculum` and `infer` return."""
    # DeepSpeed's loader has workers of its own; as children of this process they end with it.
    multiprocessing.current_process()._config["daemon"] = False
    multiprocessing.set_start_method("fork", force=True)
    return (
        train_on_own_loader(job),
        train_on_a_curriculum(job),
        [infer(job, schedule) for schedule in ("stock", "paci")],
    )


def train_on_own_loader(job):
    """The weights in the middle, between drains, and at the end of a run that gives its data to `initialize`."""
    engine = deepspeed_job.build(job, training_data=samples(job, 8))
    for _ in range(3):
        engine.train_batch()
    with engine.drained() as module:
        read = {name: value.clone() for name, value in module.named_parameters()}
    for _ in range(2):
        engine.train_batch()
    engine.drain()
    return read, deepspeed_job.weights(engine)


def samples(job, micro_batches):
    """A data set whose loader gives the micro-batches of the job."""
    each = [jobs.micro_batch(job.model, index) for index in range(micro_batches)]
    return [pair for inputs, labels in each for pair in zip(inputs, labels, strict=True)]


def train_on_a_curriculum(job):
    """The weights after four batches in the order that DeepSpeed's scheduler of curricula gives, and the order."""
    from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

    curriculum = CurriculumScheduler(
        {
            "min_difficulty": 1,
            "max_difficulty": 9,
            "schedule_type": "fixed_linear",
            "schedule_config": {"total_curriculum_step": 4, "difficulty_step": 1},
        }
    )
    engine, drawn = deepspeed_job.build(job), []
    for step in range(4):
        difficulty = curriculum.update_difficulty(step)
        drawn += [(5 * step) % difficulty, (5 * step + 2) % difficulty]
        engine.train_batch(labels_of_first_stage(jobs.micro_batch(job.model, index) for index in drawn[-2:]))
    engine.drain()
    return drawn, deepspeed_job.weights(engine)


def labels_of_first_stage(batch):
    """Micro-batches whose labels the first stage tells the last one while they are read, as where they are random."""
    for inputs, labels in batch:
        told = labels if dist.get_rank() == 0 else torch.zeros_like(labels)
        dist.broadcast(told, 0)
        yield inputs, told


def infer(job, schedule):
    """The outputs of a module that has neither a loss nor an optimizer."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    module = PipelineModule(jobs.layers(job.model), num_stages=job.stages, partition_method="uniform")
    engine, *_ = deepspeed.initialize(model=module, config=deepspeed_job.config(job, schedule))
    return engine.eval_batch(jobs.data(job.model), compute_loss=False, reduce_output=None)


@pytest.fixture(scope="module")
def fed():
    return ranks.run_ranks(feed_in_other_ways, 2, (DATA,))


def test_the_engine_s_own_loader_feeds_it_again_and_again(fed):
    """Eight micro-batches: the fifth batch of two begins with the first one again."""
    truth = reference.Reference(DATA)
    read = truth.run()[3]
    truth.data = [jobs.data(DATA.model)]
    truth.act("train")
    last = truth.act("drain")
    for stage, ((seen, weights), _, _) in enumerate(fed):
        assert all(torch.equal(seen[name], value) for name, value in read.weights[stage].items())
        assert all(torch.equal(weights[name], value) for name, value in last.weights[stage].items())


def test_a_curriculum_is_drawn_in_the_iterator(fed):
    drawn = fed[0][1][0]
    assert len(set(drawn)) > 3
    truth = reference.Reference(dataclasses.replace(DATA, script=("train x4", "drain")))
    truth.data = [iter([jobs.micro_batch(DATA.model, index) for index in drawn])]
    last = truth.run()[-1]
    for stage, (_, (order, weights), _) in enumerate(fed):
        assert order == drawn
        assert all(torch.equal(weights[name], value) for name, value in last.weights[stage].items())


def test_a_module_without_loss_and_optimizer_infers_as_under_stock(fed):
    for stage, (_, _, (stock, paci)) in enumerate(fed):
        assert flat(stock) == flat(paci)
        assert (stock is None) == (stage == 0)

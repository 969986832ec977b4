"""What else a real job's config holds: each works as the reference or stock does, or is refused with its reason."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from integration_tests import sliced_model
from integration_tests.test_deepspeed_collectives import recorded
from integration_tests.test_deepspeed_errors import assert_refused
from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job
from testing.reference.deepspeed import Moment, Reference
from testing.reference.deepspeed import run as reference_of

SCRIPT = ("train x5", "drain", "train x3", "eval")
ZERO = {
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000},
    "zero_allow_untested_optimizer": True,
}
OFFLOAD = {
    "zero_optimization": {**ZERO["zero_optimization"], "offload_optimizer": {"device": "cpu"}},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
JOB = Job(stages=2, accumulation=3, script=SCRIPT)
HALF = Job(stages=2, accumulation=3, script=SCRIPT, config={"fp16": {"enabled": True, "loss_scale": 128.0}, **ZERO})


# ---- what a job of the engine is in the reference --------------------------------------------------------------------


def recomputed(reference: Reference, kinds: tuple[str, ...]) -> None:
    """Layers of these classes save their inputs only, and run again before their backward, on the weights of then."""
    for stage in reference.stages:
        for layer in stage.module:
            if type(layer).__name__ in kinds:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def autocast(reference: Reference) -> None:
    """Stages run under torch.autocast in bfloat16."""
    for stage in reference.stages:
        stage.module.forward = torch.autocast("cpu", torch.bfloat16)(stage.module.forward)


def plain(reference: Reference) -> None:
    """Nothing is done to the reference."""


def checkpointed(reentrant: bool) -> Job:
    return dataclasses.replace(
        JOB, config={"pipeline": {"activation_checkpoint_interval": 1, "use_reentrant": reentrant}}
    )


@dataclass(frozen=True)
class Variant:
    """A job with options for its PipelineModule, and what they make of the reference."""

    job: Job
    prepare: Callable[[Reference], None]
    module: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "checkpointing, reentrant": Variant(
        checkpointed(True), functools.partial(recomputed, kinds=("_Mix",)), {"checkpointable_layers": ["_Mix"]}
    ),
    "checkpointing, not reentrant": Variant(
        checkpointed(False), functools.partial(recomputed, kinds=("_Embed", "_Mix", "Linear"))
    ),
    "fused AdamW": Variant(dataclasses.replace(JOB, optimizer="fused"), plain),
    "autocast": Variant(
        dataclasses.replace(JOB, config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}), autocast
    ),
}
OFFLOADED = {
    "fp32": Job(stages=2, accumulation=3, script=SCRIPT, config=OFFLOAD),
    "bf16": Job(stages=2, accumulation=3, script=SCRIPT, precision="bf16-bf16", config=OFFLOAD),
    "fp32, clipping": Job(
        stages=2, accumulation=3, script=SCRIPT, clip=0.4, config={**OFFLOAD, "paci": {"clip": "stage"}}
    ),
    "bf16, clipping": Job(
        stages=2,
        accumulation=3,
        script=SCRIPT,
        precision="bf16-bf16",
        clip=0.4,
        config={**OFFLOAD, "paci": {"clip": "stage"}},
    ),
}


SPARSE = Job(stages=2, accumulation=3, script=SCRIPT, model="sparse", optimizer="sgd")


def follow_variants(names: list[str]) -> dict[str, Any]:
    from deepspeed.accelerator import get_accelerator

    plainly = {"sparse": SPARSE, **{f"offload, {name}": job for name, job in OFFLOADED.items()}}
    results = {name: deepspeed_job.follow(deepspeed_job.build(job), job) for name, job in plainly.items()}
    for name in names:
        job = VARIANTS[name].job
        results[name] = deepspeed_job.follow(deepspeed_job.build(job, **VARIANTS[name].module), job)
    if get_accelerator().is_fp16_supported():
        results["fp16"] = deepspeed_job.follow(deepspeed_job.build(HALF), HALF)
    engine = deepspeed_job.build(JOB)
    engine.compile(backend="aot_eager")
    results["compiled"] = {**deepspeed_job.follow(engine, JOB), "is": engine.is_compiled}
    return results


@pytest.fixture(scope="module")
def variants():
    results = ranks.run_ranks(follow_variants, 2, (list(VARIANTS),), timeout=240)
    return {name: [result[name] for result in results] for name in results[0]}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_as_its_reference(variants, name):
    reference = Reference(VARIANTS[name].job)
    VARIANTS[name].prepare(reference)
    deepspeed_job.assert_equal(variants[name], reference.run())


@pytest.mark.parametrize("name", ["checkpointing, not reentrant", "autocast"])
def test_the_variant_of_the_reference_is_another_training(name):
    """Recomputation reads newer weights and autocast rounds: not what the plain reference does."""
    job = VARIANTS[name].job
    reference = Reference(job)
    VARIANTS[name].prepare(reference)
    one, other = reference.run()[-1], reference_of(job)[-1]
    assert any((one.weights[0][key] != other.weights[0][key]).any() for key in one.weights[0])


@pytest.mark.parametrize("name", OFFLOADED)
def test_an_offloaded_optimizer_is_the_reference(variants, name):
    """ZeRO-Offload's path with PyTorch's AdamW, which needs no kernel compiled."""
    deepspeed_job.assert_as_reference(OFFLOADED[name], variants[f"offload, {name}"])


def test_a_sparse_embedding_trains_as_a_dense_one(variants):
    """But for the order in which the rows of a word are summed."""
    expected = reference_of(dataclasses.replace(SPARSE, model="words"))
    for stage, result in enumerate(variants["sparse"]):
        for moment, truth in zip(result["moments"], expected, strict=True):
            for key, value in truth.weights[stage].items():
                torch.testing.assert_close(moment["weights"][key], value, rtol=1e-5, atol=1e-5)


def test_compiled_layers_are_the_reference(variants):
    """engine.compile(): forward and backward graphs of torch.compile, with PyTorch's own kernels in them."""
    assert all(result["is"] for result in variants["compiled"])
    deepspeed_job.assert_as_reference(JOB, variants["compiled"])


def test_fp16_with_a_fixed_loss_scale_is_the_reference(variants):
    if "fp16" not in variants:
        pytest.skip("this CPU has no fp16")
    deepspeed_job.assert_as_reference(HALF, variants["fp16"])


# ---- tensor parallelism ---------------------------------------------------------------------------------------------

SLICES = 2
GLOBAL = {"paci": {"clip": "global"}}
PREDICTING = {"paci": {"clip": "global", "prediction": "every"}}
SLICED = {
    "fp32": Job(stages=2, accumulation=3, script=SCRIPT),
    "by stage": Job(stages=2, accumulation=3, script=SCRIPT, clip=0.4, config={"paci": {"clip": "stage"}}),
    "global": Job(stages=2, accumulation=3, script=SCRIPT, clip=0.4, config=GLOBAL),
    "global, ZeRO-1": Job(stages=2, accumulation=3, script=SCRIPT, clip=0.4, config={**ZERO, **GLOBAL}),
    "global, bf16": Job(
        stages=2, accumulation=3, script=SCRIPT, clip=0.4, precision="bf16", optimizer="sgd", config=GLOBAL
    ),
    "global, prediction": Job(stages=2, accumulation=3, script=SCRIPT, clip=0.4, optimizer="sgd", config=PREDICTING),
    "global, prediction, bf16": Job(
        stages=2, accumulation=3, script=SCRIPT, clip=0.4, precision="bf16", optimizer="sgd", config=PREDICTING
    ),
}


def follow_slices(world: int, replicas: int = 1, names: tuple[str, ...] = tuple(SLICED)) -> dict[str, Any]:
    """Sliced jobs on this rank, of 2 x `replicas` x `world` ranks, and the collectives of two more batches."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    slice_rank = torch.distributed.get_rank() % world
    results: dict[str, Any] = {}
    heard: list[tuple[str, list[int]]] = []
    with recorded(lambda name, members: heard.append((name, members))):
        for name in names:
            job, topology = SLICED[name], PipeModelDataParallelTopology(num_pp=2, num_mp=world, num_dp=replicas)
            engine = deepspeed_job.build(job, layers=sliced_model.layers(slice_rank, world), topology=topology)
            job = job.of_replica(engine.grid.get_data_parallel_id())
            if world > 1:
                sliced_model.use_group(engine.module, engine.grid.get_slice_parallel_group())
            result = deepspeed_job.follow(engine, job)
            feed = jobs.data(job.model, 5_000)
            heard.clear()
            for _ in range(2):
                engine.train_batch(feed)
            results[name] = {**result, "collectives": list(heard)}
    return results


@pytest.fixture(scope="module")
def sliced():
    """What the ranks returned, by the number of slices: without and with tensor parallelism."""
    return {world: ranks.run_ranks(follow_slices, 2 * world, (world,), timeout=240) for world in (1, SLICES)}


@pytest.mark.parametrize("name", SLICED)
def test_sliced_layers_train_as_whole_ones(sliced, name):
    assert_near(name, sliced[1], sliced[SLICES])


def assert_near(name: str, whole: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
    """But for the order of sums, which is 1e-5 of a weight in fp32 after eight updates, and 2e-2 in bf16."""
    near = 2e-2 if SLICED[name].precision == "bf16" else 1e-5
    for rank, result in enumerate(parts):
        other, part = divmod(rank, SLICES)
        for moment, truth in zip(result[name]["moments"], whole[other][name]["moments"], strict=True):
            assert moment["loss"] == pytest.approx(truth["loss"], rel=near, nan_ok=True)
            for key, value in truth["weights"].items():
                expected = sliced_model.shard_of(key, value, part, SLICES)
                torch.testing.assert_close(moment["weights"][key], expected, rtol=near, atol=near)


@pytest.mark.slow
def test_slices_and_replicas_together_train_as_whole_layers():
    """Two stages of two replicas of two slices; a rank's collectives are with the other slice and the other replica."""
    names = ("global", "global, ZeRO-1")
    whole = ranks.run_ranks(follow_slices, 4, (1, 2, names))
    parts = ranks.run_ranks(follow_slices, 8, (SLICES, 2, names))
    for name in names:
        assert_near(name, whole, parts)
        for rank, result in enumerate(parts):
            spans = {tuple(members) for _, members in result[name]["collectives"] if len(members) > 1}
            replicas = (rank & ~2, rank | 2)
            assert spans == {(rank & ~1, rank | 1), replicas}, f"{name}: {spans}"


@pytest.mark.parametrize("name", SLICED)
def test_slices_agree_on_what_they_share(sliced, name):
    for stage in range(2):
        first, second = (sliced[SLICES][stage * SLICES + part][name]["moments"][-1] for part in range(SLICES))
        shared = [key for key in first["weights"] if not key.endswith(("up", "down"))]
        assert shared
        assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in shared)


def test_collectives_stay_among_the_slices_of_a_stage(sliced):
    for rank, result in enumerate(sliced[SLICES]):
        stage = rank // SLICES
        for name in SLICED:
            spans = {tuple(members) for _, members in result[name]["collectives"] if len(members) > 1}
            assert spans == {(stage * SLICES, stage * SLICES + 1)}, f"{name}: {spans}"


def test_whole_layers_are_the_reference(sliced):
    for name in ("fp32", "by stage"):
        results = [result[name] for result in sliced[1]]
        deepspeed_job.assert_as_reference(SLICED[name], results, layers=sliced_model.layers())


# ---- what does not run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, ["torch_autocast", "bfloat16"]),
        ({"autotuning": {"enabled": True}}, ["autotuning", "paci plan"]),
        (
            {"comms_logger": {"enabled": True}, "paci": {"early_receives": True}},
            ["early_receives", "comms_logger", "switch one of the two off"],
        ),
    ],
    ids=["float16 autocast", "autotuning", "a logger that waits for the device, and receives posted before"],
)
def test_what_cannot_run_is_refused(config, says):
    assert_refused("UnsupportedError", config, says=says)


@pytest.mark.parametrize("key", ["progressive_layer_drop", "curriculum_learning", "sparse_gradients"])
def test_options_that_deepspeed_has_removed_are_refused_by_deepspeed(key):
    assert_refused("DeepSpeedConfigError", {key: {"enabled": True}}, says=[key])


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "NotImplementedError"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "NotImplementedError"),
    ],
    ids=["bf16 summed in fp32 without ZeRO", "fp32 summed in bf16 without ZeRO"],
)
@pytest.mark.parametrize("schedule", ["stock", "paci"])
def test_gradient_sums_that_stock_refuses_are_refused(schedule, config, error):
    assert_refused(error, config, target=build_with, args=(schedule,), says=["grad_accum_dtype"])


def build_with(job: Job, schedule: str) -> None:
    deepspeed_job.build(job, schedule)


CURRICULUM = {
    "data_efficiency": {
        "enabled": True,
        "seed": 1,
        "data_sampling": {
            "enabled": True,
            "num_epochs": 1,
            "num_workers": 0,
            "curriculum_learning": {
                "enabled": True,
                "data_cluster_path": "",
                "curriculum_metrics": {
                    "number": {
                        "difficulty_type": "percentile",
                        "clustering_type": "single_cluster",
                        "min_difficulty": 1,
                        "max_difficulty": 100,
                        "schedule_type": "fixed_linear",
                        "schedule_config": {"total_curriculum_step": 4, "difficulty_step": 1},
                    }
                },
            },
        },
    }
}


def train_with_curriculum(schedule: str, folder: str) -> None:
    """A batch from DeepSpeed's own loader, which draws samples by difficulty."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    import paci_schedule

    paci_schedule.register("deepspeed")
    deepspeed.init_distributed(verbose=False)
    module = PipelineModule(jobs.layers("words"), num_stages=2, partition_method="uniform", loss_fn=jobs.loss)
    config = deepspeed_job.config(JOB, schedule) | CURRICULUM
    config["data_efficiency"]["data_sampling"]["curriculum_learning"]["data_cluster_path"] = folder
    ids = torch.randint(13, (60, 5))
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=jobs.optimizer(JOB),
        model_parameters=list(module.parameters()),
        config=config,
        training_data=torch.utils.data.TensorDataset(ids, ids),
    )
    engine.train_batch()


@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_the_sampler_of_the_curriculum_fails_in_a_pipeline_under_stock_too(schedule, tmp_path):
    """It broadcasts from rank 0 in every stage's data-parallel group; rank 0 is only in the first stage's."""
    outcomes = ranks.gather_outcomes(train_with_curriculum, 2, (schedule, str(tmp_path)), timeout=90, grace=3)
    assert outcomes[1].raised[0] == "ValueError"
    assert "not part of group" in outcomes[1].error


def follow_cpu_adam() -> tuple[dict[str, Any], list[Moment]]:
    """A job with DeepSpeed's own optimizer for offloading, and its reference, which needs the kernel as well."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    job = dataclasses.replace(OFFLOADED["bf16"], optimizer=functools.partial(DeepSpeedCPUAdam, lr=0.02))
    return deepspeed_job.follow(deepspeed_job.build(job), job), reference_of(job)


@pytest.mark.slow
def test_deepspeed_cpu_adam_is_the_reference():
    """Slow the first time: DeepSpeed compiles the kernel."""
    results = ranks.run_ranks(follow_cpu_adam, 2, timeout=900)
    deepspeed_job.assert_equal([result for result, _ in results], results[0][1])

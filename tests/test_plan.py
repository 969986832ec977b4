"""The planner: the published ratios, the arithmetic of its rows, and why rows are refused."""

import dataclasses
import itertools
import json

import pytest

from paci_schedule import ConfigError, PipelineSpec
from paci_schedule.plan.hardware import Device, Link, preset
from paci_schedule.plan.job import DATA_PARALLEL, Job, Row
from paci_schedule.plan.layers import Layer
from paci_schedule.plan.models import Measured, built_in, from_layers, load_config
from paci_schedule.plan.partition import evaluate, memory_of_stages
from paci_schedule.plan.prices import costs_of
from paci_schedule.plan.search import calibrated, search
from paci_schedule.plan.settings import deepspeed_config, megatron_flags, megatron_layout, pipeline_module
from paci_schedule.plan.transformer import from_config

GIB = 2**30


PLAIN = Device(memory=80 * GIB)  # one operation a second


def uniform(count, forward=0.04, backward=0.08, parameters=1e6, input_bytes=1e4, saved_bytes=1e6):
    layer = Layer(
        forward=forward,
        backward=backward,
        parameters=parameters,
        input_bytes=input_bytes,
        saved_bytes=saved_bytes,
        output_bytes=input_bytes,
    )
    return Measured([layer] * count, 1024)


def transformer(blocks):
    """Layers as in `uniform`, which are an embedding, blocks and a head."""
    (plain,) = uniform(1).layers
    roles = ["embedding", *["block"] * blocks, "head"]
    return Measured([dataclasses.replace(plain, role=role) for role in roles], 1024)


def job(memory=80 * GIB, flops=1.0, bandwidth=float("inf"), latency=0.0, **changes):
    link = Link(bandwidth=bandwidth, latency=latency)
    device = Device(memory=memory, flops=flops, inside=link, between=link)
    given = {"model": uniform(8), "device": device, "devices": 8, "global_batch": 8, "recompute": (False,)}
    return Job(**given | changes)


def best(rows, name, **wanted):
    return next(row for row in rows if row.schedule == name and all(getattr(row, key) == wanted[key] for key in wanted))


# ---- the published set-up -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulation", "ratio"), [(8, 1.875), (16, 1.4375)])
def test_ideal_ratios_of_eight_stages(accumulation, ratio):
    rows = search(job(global_batch=accumulation, stages=(8,), micro_batch_sizes=(1,)))
    paci = best(rows, "paci")
    assert (paci.accumulation, paci.drift) == (accumulation, 1)
    assert paci.against_1f1b == pytest.approx(ratio, rel=1e-12)
    assert paci.tokens_per_second == pytest.approx(1024 / 0.12)
    assert best(rows, "1f1b").against_1f1b == 1


def test_the_plan_projects_the_measured_throughputs_of_a_cluster():
    """14.6 B, 16 stages, 64 micro-batches: from 1F1B's 1.49 samples/s per GPU to about 1.84; ZB-2p measured 1.83."""
    shape = {"devices": 16, "global_batch": 64, "stages": (16,), "micro_batch_sizes": (1,)}
    even = search(calibrated(job(model=uniform(16), **shape), 1.49))
    assert best(even, "1f1b").samples_per_second_per_device == pytest.approx(1.49, rel=1e-6)
    assert best(even, "paci").samples_per_second_per_device == pytest.approx(1.49 * 79 / 64, rel=1e-6)
    model = from_config(load_config("gpt-14.6b"))
    assert model.parameters == pytest.approx(14.6e9, rel=0.03)
    rows = search(calibrated(job(model=model, **shape), 1.49))
    assert best(rows, "1f1b").samples_per_second_per_device == pytest.approx(1.49, rel=1e-6)
    assert best(rows, "paci").samples_per_second_per_device == pytest.approx(1.84, rel=0.015)
    assert best(rows, "zb-h2").samples_per_second_per_device == pytest.approx(1.83, rel=0.015)
    assert best(rows, "zb-h1").samples_per_second_per_device == pytest.approx(1.67, rel=0.025)
    assert best(rows, "zb-h2").memory > 1.2 * best(rows, "1f1b").memory


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_memory_of_a_row():
    rows = search(
        job(
            model=uniform(4, parameters=1e6, saved_bytes=5e6),
            devices=4,
            global_batch=8,
            stages=(4,),
            micro_batch_sizes=(1,),
            max_drift=3,
        )
    )
    plain = 1e6 * (2 + 4 + 12)
    live = 5e6 + 3 * 1e4  # what the layer saves, its input, what came and what went
    assert best(rows, "1f1b").memory == plain + 4 * live
    assert best(rows, "paci").memory == plain + 4 * live
    assert best(rows, "gpipe").memory == plain + 8 * live
    assert best(rows, "zb-h2").memory == plain + 7 * live
    assert best(rows, "pipedream-2bw").memory == plain + 2e6 + 4 * live
    assert best(rows, "pipedream").memory == plain + 3 * 2e6 + 4 * live


def test_zero_divides_the_optimizer_over_the_replicas_and_recompute_keeps_inputs():
    shape = {"devices": 8, "stages": (2,), "micro_batch_sizes": (2,), "schedules": ("1f1b",), "global_batch": 32}
    with_zero, without = (search(job(zero=zero, **shape))[0].memory for zero in (1, 0))
    assert without - with_zero == 4e6 * 12 * 3 / 4
    recomputed = search(job(recompute=(True,), **shape))[0]
    assert recomputed.memory == 4e6 * (6 + 3) + (2 * (4 + 2) * 1e4 + 1e6) * 2
    assert recomputed.tokens_per_second == pytest.approx(search(job(**shape))[0].tokens_per_second * 3 / 4)


def test_the_slowest_stage_is_as_fast_as_it_can_be():
    light, heavy = uniform(1).layers[0], uniform(1, forward=0.08, backward=0.16).layers[0]
    model = Measured([light] * 5 + [heavy], 1024)
    row = search(
        job(
            model=model,
            devices=3,
            global_batch=6,
            stages=(3,),
            micro_batch_sizes=(1,),
            schedules=("paci",),
            max_drift=2,
        )
    )[0]
    assert row.layers in ([2, 3, 1], [3, 2, 1])
    assert row.tokens_per_second == pytest.approx(1024 / (3 * 0.12))


def test_where_the_even_partition_does_not_fit_an_uneven_one_is_found():
    """The first of two stages keeps two micro-batches of every layer: with memory for seven it gets three layers."""
    shape = {"devices": 2, "stages": (2,), "micro_batch_sizes": (1,), "schedules": ("1f1b",), "global_batch": 4}
    model = uniform(8, parameters=0.0, input_bytes=0.0, saved_bytes=1e6)
    (even,) = search(job(model=model, **shape))
    (uneven,) = search(job(model=model, memory=7e6, **shape))
    (refused,) = search(job(model=model, memory=5e6, **shape))
    assert (even.layers, even.memory) == ([4, 4], 8e6)
    assert (uneven.layers, uneven.memory) == ([3, 5], 6e6)
    assert uneven.tokens_per_second < even.tokens_per_second
    assert refused.refused.startswith("needs 0.0 GiB of")


LLAMA_3_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "intermediate_size": 14336,
    "hidden_act": "silu",
}


def test_llama_fits_wherever_any_partition_does():
    """8 stages, micro-batches of 4 x 4096 tokens.  A block keeps 139,264 bytes a token with its input: 2 each of h for
    the input, two norms, queries, what the attention leaves and the second sum, of 2 x 1024 for keys and values, and of
    3 x 14336 for the MLP.  A second stage of 4 blocks has 7 in flight: 63.9 of 80 GB, besides 4 x 218 M parameters.
    """
    model, stages, tokens = from_config(LLAMA_3_8B, sequence_length=4096), 8, 4 * 4096
    block, row, words = tokens * 139264, tokens * 2 * 4096, 128256 * 4096
    parameters = [words, *[218_112_000] * 32, words + 4096]
    live = [8 * tokens, *[block] * 32, row + tokens * (2 * 4096 + 4 * 128256)]
    once = tokens * 6 * 128256  # the logits' copy and gradients
    assert model.parameters == sum(parameters) == 8_030_261_248

    def held(stage, start, stop):
        kept = sum(live[start:stop]) + (live[0] if start == 0 else row) + (row if stop < 34 else 0)
        return 18 * sum(parameters[start:stop]) + (stages - stage) * kept + once * (stop == 34)

    def fits(limit):
        """Whether any partition does: the stages are filled one after the other, for each layer adds to its stage."""
        start = 0
        for stage in range(stages):
            stop = max(end for end in range(start, 35) if end == start or held(stage, start, end) <= limit)
            start = stop
        return start == 34

    low, high = 40 * GIB, 200 * GIB
    while high - low > 1e5:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    assert high < 76 * GIB
    shape = {"stages": (8,), "micro_batch_sizes": (4,), "schedules": ("1f1b",), "global_batch": 32, "zero": 0}
    for limit, runs in ((80 * GIB, True), (high + 1e5, True), (low - 1e5, False)):
        (found,) = search(job(model=model, memory=limit, flops=1e14, **shape))
        assert bool(found.refused) != runs
        if runs:
            bounds = list(itertools.pairwise(found.bounds))
            assert found.memory == max(held(stage, *span) for stage, span in enumerate(bounds)) <= limit


def test_replicas_pay_for_their_gradients():
    fast, slow = (
        search(
            job(
                devices=4,
                stages=(2,),
                global_batch=16,
                micro_batch_sizes=(1,),
                schedules=("paci",),
                bandwidth=bandwidth,
            )
        )[0]
        for bandwidth in (float("inf"), 1e9)
    )
    per_batch = [16 * 1024 / row.tokens_per_second for row in (fast, slow)]
    ring = 2 * (2 - 1) / 2 * 4e6 * 4 / 1e9
    assert per_batch[1] - per_batch[0] >= ring - 1e-9


def test_rows_are_ranked_and_refusals_say_why():
    rows = search(job(memory=0.08 * GIB, global_batch=32, max_drift=1))
    runs = [row for row in rows if not row.refused]
    speeds = [row.tokens_per_second for row in runs]
    assert all(faster >= slower * 0.99 for faster, slower in itertools.pairwise(speeds))
    assert speeds[0] > 1.2 * speeds[-1]
    assert rows[: len(runs)] == runs
    assert {row.schedule for row in rows if row.stages == 1} == {DATA_PARALLEL}
    reasons = " | ".join(row.refused for row in rows)
    assert "GiB of 0.1" in reasons
    assert "limit 1" in reasons
    assert "8 stages with 2 chunks, and 8 layers" in reasons


def test_a_split_backward_cannot_recompute():
    rows = search(job(recompute=(True,), stages=(8,), schedules=("zb-h1",)))
    assert all("W needs" in row.refused for row in rows)


def test_settings_of_a_row():
    model = transformer(6)
    wanted = job(model=model, stages=(8,), micro_batch_sizes=(1,), schedules=("paci",), recompute=(True,))
    row = search(wanted)[0]
    assert deepspeed_config(wanted, row) == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 8,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1},
        "pipeline_schedule": "paci",
    }
    assert pipeline_module(row) == {
        "num_stages": 8,
        "partition_method": [0, 1, 2, 3, 4, 5, 6, 7, 8],
        "activation_checkpoint_interval": 1,
    }
    flags = megatron_flags(wanted, row)
    assert flags[flags.index("--pipeline-model-parallel-size") + 1] == "8"
    assert flags[flags.index("--pipeline-model-parallel-layout") + 1] == "E|t|t|t|t|t|t|L"
    assert flags[flags.index("--pipeline-schedule") + 1] == "paci"
    assert "--recompute-granularity" in flags


@pytest.mark.parametrize(
    ("blocks", "bounds", "layout"),
    [
        (46, [0, 4, *range(7, 47, 3), 48], "Ettt|" + "ttt|" * 14 + "tL"),  # 3 + 14 x 3 + 1 = 46 blocks on 16 stages
        (12, [0, 5, 9, 13, 14], "Etttt|tttt|tttt|L"),
        (6, [0, 3, 5, 8], ""),  # two blocks on every stage, as Megatron-LM divides them by itself
        (6, [0, 3, 6, 8], "Ett|ttt|tL"),
        (3, [0, 5], ""),
    ],
)
def test_the_layout_for_megatron_says_which_layers_each_stage_has(blocks, bounds, layout):
    assert megatron_layout(transformer(blocks).layers, bounds) == layout


def test_deepspeed_sums_in_fp32_with_zero_only_and_slices_nothing():
    row = search(job(stages=(8,), micro_batch_sizes=(1,), schedules=("paci",)))[0]
    with pytest.raises(ConfigError, match="plan with --zero 1"):
        deepspeed_config(job(zero=0), row)
    with pytest.raises(ConfigError, match="slices no layers"):
        deepspeed_config(job(), dataclasses.replace(row, slices=2))


def test_layers_without_roles_have_no_layout():
    with pytest.raises(ConfigError, match='write "role" to each layer'):
        megatron_layout(uniform(8).layers, [0, 4, 8])


# ---- models ---------------------------------------------------------------------------------------------------------


def predicted(prediction, accumulation=8, **changes):
    """The row of PACI on four stages of 1e9 parameters each, with so many micro-batches an update."""
    shape = {"devices": 4, "stages": (4,), "micro_batch_sizes": (1,), "schedules": ("paci",), "max_drift": 3} | changes
    replicas = shape["devices"] // 4
    model = uniform(4, forward=1.0, backward=2.0, parameters=1e9, input_bytes=0.0, saved_bytes=0.0)
    (row,) = search(job(model=model, global_batch=accumulation * replicas, prediction=prediction, **shape))
    return row


@pytest.mark.parametrize(
    ("prediction", "accumulation", "count"),
    [("off", 8, 0), ("window", 8, 1), ("every", 8, 3), (2, 8, 2), (3, 8, 1), ("every", 2, 2), ("window", 2, 1)],
)
def test_predictions_of_an_update(prediction, accumulation, count):
    """The first of four stages runs three micro-batches ahead; of two micro-batches an update, all are stale."""
    row = predicted(prediction, accumulation)
    assert row.predictions == count
    settings = deepspeed_config(job(prediction=prediction), row)
    assert settings.get("paci") == ({"prediction": prediction} if prediction != "off" else None)
    flags = " ".join(megatron_flags(job(model=transformer(2), prediction=prediction), row))
    assert (f"--paci-prediction {prediction}" in flags) == (prediction != "off")


@pytest.mark.parametrize(
    ("prediction", "accumulation", "versions"),
    [("off", 8, 1), ("window", 8, 1), ("every", 8, 1), ("every", 2, 1), ("window", 3, 1), ("window", 2, 2), (2, 1, 2)],
)
def test_a_prediction_takes_memory_only_where_it_outlasts_a_call(prediction, accumulation, versions):
    assert predicted(prediction, accumulation).memory == 1e9 * (2 * versions + 4 + 12)


@pytest.mark.parametrize(
    ("prediction", "gathers"), [("off", [0, 0, 0, 0]), ("window", [2, 2, 2, 0]), ("every", [6, 4, 2, 0]),
                                (2, [3, 2, 2, 0])]
)  # fmt: skip
def test_replicas_gather_what_they_predict_and_the_real_weights_again(prediction, gathers):
    """Two replicas, 1 GB/s: an update passes on half of 8 bytes a parameter, a gather half of 2; F and B take 3 s."""
    row = predicted(prediction, devices=8, bandwidth=1e9)
    slowest = 8 * 3 + max(0.5 * (8 + 2 * count) for count in gathers)
    assert row.tokens_per_second == pytest.approx(2 * 8 * 1024 / slowest, rel=1e-4)


def test_other_schedules_predict_nothing():
    rows = search(job(prediction="every", stages=(8,), micro_batch_sizes=(1,)))
    assert {row.schedule: row.predictions for row in rows if row.predictions} == {"paci": 7}
    assert all("paci" not in deepspeed_config(job(prediction="every"), row) for row in rows if row.schedule != "paci")


def test_what_is_no_prediction_is_refused():
    with pytest.raises(ConfigError, match=r"prediction='evry': must be 'off'"):
        job(prediction="evry")


@pytest.mark.parametrize(("name", "millions"), [("gpt2-medium", 406), ("gpt-1.5b", 1640), ("gpt-6.2b", 6450)])
def test_built_in_sizes(name, millions):
    assert name in built_in()
    assert from_config(load_config(name)).parameters == pytest.approx(millions * 1e6, rel=0.03)


def test_newer_configs_and_their_defaults(tmp_path):
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 32,
        "intermediate_size": 96,
        "hidden_act": "silu",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = from_config(load_config(str(tmp_path)), sequence_length=16)
    embedding, block, *_, head = model.layers_on(PLAIN, 1)
    matrices = 64 * 64 * 2 + 64 * 16 * 2 + 3 * 64 * 96
    assert (model.count, model.tied, model.gated) == (5, False, True)
    assert block.forward == 16 * (2 * matrices + 4 * 16 * 64)
    assert block.backward == 2 * block.forward
    assert block.parameters == matrices + 2 * 64  # two RMSNorms, no biases
    assert (embedding.parameters, head.parameters) == (100 * 64, 100 * 64 + 64)
    # Of h = 64 bytes a token: two norms' outputs, queries and what the attention leaves, the second sum; keys and
    # values of 16 each; gate, value and product of 96 each.
    assert block.saved_bytes == 16 * 2 * (64 + 64 + 64 + 64 + 64 + 2 * 16 + 3 * 96)
    assert head.saved_bytes == 16 * (2 * 64 + 4 * 100)
    wide = from_config(config | {"head_dim": 16}, sequence_length=16).layers_on(PLAIN, 1)[1]
    assert wide.parameters - block.parameters == 64 * 8 * (8 + 8 + 2 + 2)


def test_the_layers_of_gpt2_are_those_of_the_model():
    """The published sizes: 124,439,808 parameters, and 354,823,168 of the medium one, with their heads tied."""
    sizes = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
    assert from_config(sizes).parameters == 124_439_808
    assert from_config(sizes | {"n_layer": 24, "n_embd": 1024}).parameters == 354_823_168
    assert from_config(sizes, tied=False).parameters == 124_439_808 + 768 * 50257
    block = from_config(sizes).layers_on(PLAIN, 1)[1]
    assert block.saved_bytes + block.input_bytes == 34 * 1024 * 768  # arXiv 2205.05198, equation 2 without scores
    unfused = dataclasses.replace(from_config(sizes), fused_attention=False).layers_on(PLAIN, 1)[1]
    assert unfused.saved_bytes - block.saved_bytes == 5 * 12 * 1024**2  # the rest of the equation


def test_slices_divide_the_layers_and_reduce_their_activations():
    model = from_config(load_config("gpt2"))
    device = dataclasses.replace(PLAIN, inside=Link(bandwidth=1e3))
    whole, half = (model.layers_on(device, 2, slices)[1] for slices in (1, 2))
    # Two all-reduces of 2 bytes a number; around a ring of two, half of them pass each link twice.
    reduces = 2 * 2 * (1 / 2) * 2 * 2 * 1024 * 768 / 1e3
    assert half.forward == pytest.approx(whole.forward / 2 + reduces)
    assert half.backward == pytest.approx(whole.backward / 2 + reduces)
    for name in ("parameters", "input_bytes", "saved_bytes", "output_bytes"):
        assert getattr(half, name) == getattr(whole, name) / 2
    assert model.check_tensor(5) == "5 slices do not divide the 12 heads"


def test_a_small_micro_batch_uses_a_device_badly():
    device = dataclasses.replace(PLAIN, saturation=64)
    assert device.seconds(1000, tokens=64) == 2000  # half of what large ones reach
    assert device.seconds(1000, tokens=64 * 9) == pytest.approx(10000 / 9)
    assert dataclasses.replace(device, memory_bandwidth=4).seconds(0, 64, moved=8) == 2


def test_links_depend_on_the_nodes():
    """Two nodes of four: stages of two ranks cross from one node to the other behind the second stage only."""
    inside, between = Link(bandwidth=100), Link(bandwidth=10)
    device = dataclasses.replace(PLAIN, node=4, inside=inside, between=between)
    wanted = Job(model=uniform(8), device=device, devices=8, global_batch=8)
    row = Row(schedule="paci", stages=4, replicas=2, micro_batch_size=1, accumulation=4, recompute=False)
    layers = wanted.model.layers_on(device, 1)
    spec = PipelineSpec(stages=4, accumulation=4)
    partition = evaluate(layers, memory_of_stages(spec), [0, 2, 4, 6, 8])
    costs = costs_of(wanted, spec, row, layers, partition)
    assert costs.bandwidth == [100, 10, 100]
    # Replicas of a stage are in one node: half of 2e6 parameters, 8 bytes each, at 100 a second.
    assert costs.step == [1e6 * 8 / 100] * 4
    overlapped = costs_of(dataclasses.replace(wanted, overlap=True), spec, row, layers, partition)
    assert overlapped.step == [pytest.approx(1e6 * 8 / 100 - 2 * 0.08)] * 4


def test_presets_keep_a_reserve():
    device = preset("H100")
    assert (device.memory - device.usable) / GIB == 3
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        preset("h10")


def test_measured_layers(tmp_path):
    entry = {"forward": 0.1, "backward": 0.2, "parameters": 5, "activation_bytes": 7, "input_bytes": 3}
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"sequence_length": 8, "layers": [entry, entry | {"count": 3, "forward": 0.4}]}))
    model = from_layers(path)
    assert [layer.forward for layer in model.layers] == [0.1, 0.4, 0.4, 0.4]
    assert (model.sequence_length, model.measured) == (8, True)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "devices=0: must be more than 0"),
        ({"zero": 2}, "zero=2: pipelines run with ZeRO stage 0 or 1"),
        ({"stages": (3,)}, "stages=3: must divide the 8 devices"),
        ({"micro_batch_sizes": (3,)}, "micro_batch_size=3: must divide the global batch of 8"),
        ({"schedules": ("zb-h3",)}, "schedule='zb-h3': must be one of"),
        ({"max_drift": -1}, "max_drift=-1"),
    ],
)
def test_bad_jobs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        job(**changes)


def _layers(**changes):
    layer = {"forward": 1, "backward": 2, "parameters": 1, "activation_bytes": 1, "input_bytes": 1}
    return json.dumps({"sequence_length": 8, "layers": [layer | changes]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ('{"sequence_length": 8, "layers": []}', "needs 1 to 1000 layers"),
        ('{"sequence_length": 8, "layers": [{"forward": 1}]}', "each layer needs forward, backward"),
        ('{"layers": []}', "sequence_length"),
        (_layers(forward=float("nan")), "forward of layer 0=nan"),
        (_layers(count=-1), "needs 1 to 1000 layers"),
        (_layers(count=1e12), "needs 1 to 1000 layers"),
        (_layers(forward=0, backward=0), "no layer takes any time"),
    ],
)
def test_bad_layer_files_are_refused(tmp_path, content, message):
    path = tmp_path / "layers.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        from_layers(path)


def test_a_config_without_a_key_is_refused():
    with pytest.raises(ConfigError, match="num_hidden_layers or n_layer"):
        from_config({"n_embd": 64})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": -4}, "hidden=-4: must be a number of at least 1"),
        ({"n_head": 0}, "heads=0"),
        ({"n_inner": "x"}, "inner='x'"),
        ({"n_layer": 5000}, "layers=5000: must be at most 1000"),
        ({"num_local_experts": 8}, "num_local_experts=8: the planner knows dense models only"),
    ],
)
def test_configs_without_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_config(load_config("gpt2") | changes)


def test_many_devices_are_searched_by_their_divisors():
    rows = search(job(devices=9_999_991, global_batch=8, schedules=("paci",)))
    assert {row.stages for row in rows} == {9_999_991}
    assert all("stages with 1 chunks, and 8 layers" in row.refused for row in rows)
    rows = search(job(devices=36, global_batch=36, schedules=("1f1b",)))
    assert sorted({row.stages for row in rows}) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert sorted(row.micro_batch_size for row in rows if row.stages == 6) == [1, 2]


def test_calibration_needs_one_run():
    config = from_config(load_config("gpt2"))
    with pytest.raises(ConfigError, match=r"measured: \d+ pipelines match"):
        calibrated(job(model=config), 1.0)
    with pytest.raises(ConfigError, match="cannot be reached"):
        calibrated(job(model=config, stages=(8,), micro_batch_sizes=(1,), latency=10.0), 100.0)

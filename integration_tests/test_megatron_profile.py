"""The layers of a Megatron model, measured for the planner."""

import json

import pytest

from paci_schedule import UnsupportedError
from paci_schedule.cli import main
from testing import ranks
from testing.megatron_model import SEQUENCE, GptJob, build, import_megatron, micro_batch, set_up

SCRIPT = """
from integration_tests.test_megatron_profile import whole_model

def untied():
    return whole_model(tied=False)

def tied():
    return whole_model(tied=True)
"""
BLOCKS = 3


def whole_model(tied):
    """A small GPT of three blocks in one stage, as `paci profile` wants it."""
    job = GptJob(stages=1, tied=tied)
    set_up(job)
    model, _ = build(job, 0, 1, BLOCKS)  # with one of them
    blocks = model.module.decoder.layers
    blocks.extend(build(job, 0, 1, BLOCKS)[0].module.decoder.layers[0] for _ in range(BLOCKS - 1))
    batch = micro_batch(0, 0)
    return {
        "model": model.module,
        "micro_batch": (batch[:, :-1].contiguous(), batch[:, 1:].contiguous()),
        "sequence_length": SEQUENCE,
    }


def with_yarn(given):
    """The model with rotary positions that are scaled as YaRN does, and its micro-batch."""
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    model = given["model"]
    model.position_embedding_type = "yarn"
    model.rotary_pos_emb = YarnRotaryEmbedding(
        kv_channels=model.config.kv_channels,
        rotary_percent=1.0,
        use_cpu_initialization=True,
        original_max_position_embeddings=SEQUENCE,
    )
    return model, given["micro_batch"]


def profile(folder):
    """Profile both models by the command; the file's layers and the parameters; another one's roles, and errors."""
    from pathlib import Path

    import_megatron()
    from paci_schedule.adapters.megatron.profiling import layer_costs

    script, found = Path(folder, "script.py"), []
    script.write_text(SCRIPT)
    for name in ("untied", "tied"):
        output = Path(folder, f"{name}.json")
        with pytest.raises(SystemExit) as exited:
            main(["profile", f"{script}:{name}", "--output", str(output), "--repeats", "1"])
        assert exited.value.code == 0
        model = whole_model(name == "tied")["model"]
        found.append((json.loads(output.read_text()), sum(each.numel() for each in model.parameters())))
    found.append([layer.role for layer in layer_costs(*with_yarn(whole_model(False)), repeats=1)])
    given = whole_model(True)
    given["model"].config.mtp_num_layers = 1
    with pytest.raises(UnsupportedError, match="measure the model without them"):
        layer_costs(given["model"], given["micro_batch"])
    given["model"].config.mtp_num_layers = None
    given["model"].output_layer = None
    with pytest.raises(UnsupportedError, match="without output_layer cannot be measured"):
        layer_costs(given["model"], given["micro_batch"])
    return found


def test_the_layers_of_a_model_of_megatron_are_measured_for_its_layout(tmp_path, capsys):
    [[(untied, parameters), (tied, shared), yarn]] = ranks.run_ranks(profile, 1, (str(tmp_path),))
    assert yarn == ["embedding", *["block"] * BLOCKS, "head"]
    for found in (untied, tied):
        assert [layer["role"] for layer in found["layers"]] == yarn
        assert (found["sequence_length"], found["micro_batch_size"]) == (SEQUENCE, 2)
        assert all(layer["forward"] > 0 and layer["backward"] > 0 for layer in found["layers"])
        blocks = found["layers"][1:-1]
        assert len({(layer["parameters"], layer["activation_bytes"]) for layer in blocks}) == 1
        assert blocks[0]["activation_bytes"] > SEQUENCE * 2 * 16 * 4  # its input, float32[sequence, samples, hidden]
    assert sum(layer["parameters"] for layer in untied["layers"]) == parameters
    assert [layer.get("tied") for layer in tied["layers"]] == ["embedding", *[None] * BLOCKS, "embedding"]
    assert sum(layer["parameters"] for layer in tied["layers"]) == shared + 24 * 16  # the last stage's copy
    with pytest.raises(SystemExit) as exited:
        main(
            f"plan --layers {tmp_path}/untied.json --devices 2 --memory 1 --global-batch 8 --stages 2 --schedule paci "
            "--micro-batch-size 2".split()
        )
    assert exited.value.code == 0
    assert "--pipeline-model-parallel-layout Et" in capsys.readouterr().out

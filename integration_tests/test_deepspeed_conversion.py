"""A GPT-2 of Hugging Face's cut into stages, trained under PACI, and its checkpoint converted back, as users do it."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job

transformers = pytest.importorskip("transformers")

JOBS = {
    "fp32": Job(stages=2, accumulation=2, script=("train x4", "save"), clip=1.0),
    "bf16, ZeRO-1": Job(stages=2, accumulation=3, script=("train x4", "save"), precision="bf16"),
}
BLOCKS = 4


def settings():
    sizes = {"vocab_size": 16, "n_positions": 8, "n_embd": 12, "n_layer": BLOCKS, "n_head": 3}
    return transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa")


class Places(nn.Embedding):
    """Adds what stands for a place to what stands for a word."""

    def forward(self, words):
        return words + self.weight[: words.shape[1]]


def layers():
    """The model's own modules, one after the other; its head shares the embedding's weight."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    size = settings()
    words = ("words", nn.Embedding, size.vocab_size, size.n_embd)
    return [
        TiedLayerSpec(*words),
        LayerSpec(Places, size.n_positions, size.n_embd),
        *(LayerSpec(GPT2Block, size, layer_idx=number) for number in range(BLOCKS)),
        LayerSpec(nn.LayerNorm, size.n_embd, eps=size.layer_norm_epsilon),
        TiedLayerSpec(*words, forward_fn=lambda embed, hidden: nn.functional.linear(hidden, embed.weight)),
    ]


def converted(checkpoint, folder):
    """Write the weights of a checkpoint's layers as Hugging Face's model has them."""
    prefixes = ["wte", "wpe", *(f"h.{number}" for number in range(BLOCKS)), "ln_f"]
    state = {}
    for path in Path(checkpoint).glob("layer_*-model_states.pt"):
        number = int(re.match(r"layer_(\d+)-", path.name)[1])
        layer = torch.load(path, weights_only=True)
        state |= {f"transformer.{prefixes[number]}.{name}": value for name, value in layer.items()}
    model = transformers.GPT2LMHeadModel(settings())
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # which is the embedding's
    model.to(next(iter(state.values())).dtype).save_pretrained(folder)


def trained(folder):
    """By job, what the last stage puts out after the checkpoint was saved; None on the others."""
    outputs = {}
    for name, job in JOBS.items():
        torch.manual_seed(7)
        engine = deepspeed_job.build(job, layers=layers())
        assert type(engine).__name__ == "PaciPipelineEngine"
        moments = deepspeed_job.follow(engine, job, f"{folder}/{name}")["moments"]
        assert moments[-2]["stats"]["in_flight"] == 1 - engine.stage_id
        evaluated = engine.eval_batch(jobs.data(job.model), return_logits=True, num_micro_batches=1)
        outputs[name] = evaluated[1] if engine.is_last_stage() else None
    return outputs


def test_a_checkpoint_of_paci_becomes_a_model_that_hugging_face_loads(tmp_path):
    outputs = ranks.run_ranks(trained, 2, (str(tmp_path),))[1]
    for name, logits in outputs.items():
        converted(tmp_path / name / "common", tmp_path / name / "hf")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / "hf", dtype="auto").eval()
        assert model.dtype == logits.dtype == (torch.float32 if name == "fp32" else torch.bfloat16)
        words, _ = jobs.micro_batch(JOBS[name].model, 0)
        with torch.no_grad():
            assert torch.equal(model(words).logits, logits), name

"""python -m testing.swift_cpu.model FOLDER: two tiny models of Hugging Face, and data to train them on."""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

_SAMPLES = 40


def main(folder: Path) -> None:
    """Every byte is a token; the letters of a text are not equally frequent, so that there is something to learn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    for model in ("model", "experts"):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder / model)
    size = {
        "vocab_size": len(alphabet) + 4,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**size, intermediate_size=64)).save_pretrained(folder / "model")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, **experts)).save_pretrained(folder / "experts")
    drawn = random.Random(2)
    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        for _ in range(_SAMPLES):
            letters = (chr(ord("a") + min(int(drawn.expovariate(0.2)), 25)) for _ in range(drawn.randint(8, 30)))
            file.write(_sample("".join(letters)))
    (folder / "same.jsonl").write_text(_sample("a bad cab faced a decade") * _SAMPLES, encoding="utf-8")


def _sample(text: str) -> str:
    """A line of data."""
    return json.dumps({"messages": [{"role": "assistant", "content": text}]}) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

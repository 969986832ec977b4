"""A Hugging Face GPT-2 cut into DeepSpeed pipeline layers: token embedding, one layer a block, head.

The blocks are `transformers`' own `GPT2Block`, every layer starts from `transformers`' own initialisation, and the head
has its own weights (untied).  Laid end to end the layers compute what `GPT2LMHeadModel` does with untied embeddings.
"""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn
from torch.nn import functional
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2PreTrainedModel

from launch.errors import LaunchError
from paci_schedule.adapters.deepspeed import CutPipelineModule
from paci_schedule.plan.partition import Partition

__all__ = ["SIZES", "GPT2Head", "GPT2PipeBlock", "TokenEmbedding", "gpt2_config", "gpt2_layers", "gpt2_pipeline"]

SIZES = {
    "tiny": {"n_layer": 4, "n_embd": 128, "n_head": 4},
    "small": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
}


def gpt2_config(
    model: str, *, vocabulary: int, sequence_length: int, dropout: float = 0.0, blocks: int | None = None
) -> GPT2Config:
    """The configuration of `model`: a name in `SIZES` or the path of a `transformers` GPT-2 JSON file.

    Args:
        model: name or path.
        vocabulary: number of distinct tokens.
        sequence_length: positions that the model learns.
        dropout: after the embedding, on the attention and on every residual branch.
        blocks: number of transformer blocks, instead of the model's own.

    Raises:
        LaunchError: `model` is neither a known name nor a file.
    """
    if model in SIZES:
        config = GPT2Config(**SIZES[model])
    elif Path(model).is_file():
        config = GPT2Config.from_json_file(model)
    else:
        raise LaunchError(f"model {model!r}: must be one of {', '.join(SIZES)}, or the path of a GPT-2 config.json")
    config.update(
        {
            "vocab_size": vocabulary,
            "n_positions": sequence_length,
            "n_layer": blocks or config.n_layer,
            "resid_pdrop": dropout,
            "embd_pdrop": dropout,
            "attn_pdrop": dropout,
            "use_cache": False,
            "tie_word_embeddings": False,
        }
    )
    # A block without a model around it would fall back to eager attention, which is not causal without a mask.
    config._attn_implementation = "sdpa"
    return config


class TokenEmbedding(nn.Module):
    """Token ids (b, s) to hidden states (b, s, n_embd): token plus position embedding, dropout."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        _initialise(self, config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        return self.drop(self.wte(tokens) + self.wpe(positions))


class GPT2PipeBlock(GPT2Block):
    """`transformers`' GPT-2 block, initialised.  Hidden states (b, s, n_embd) to the same shape."""

    def __init__(self, config: GPT2Config, index: int) -> None:
        super().__init__(config, layer_idx=index)
        _initialise(self, config)


class GPT2Head(nn.Module):
    """Hidden states (b, s, n_embd) to logits (b, s, vocabulary): final norm and a projection of its own."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        _initialise(self, config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.ln_f(hidden))


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats, of logits (b, s, vocabulary) against token ids (b, s); computed in fp32."""
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def gpt2_layers(config: GPT2Config) -> list[LayerSpec]:
    """The model as pipeline layers, built only on the stage that owns them."""
    blocks = [LayerSpec(GPT2PipeBlock, config, index) for index in range(config.n_layer)]
    return [LayerSpec(TokenEmbedding, config), *blocks, LayerSpec(GPT2Head, config)]


def gpt2_pipeline(
    config: GPT2Config, *, stages: int, seed: int, partition: str | Partition = "parameters"
) -> PipelineModule:
    """The model cut into `stages`.  Its initial weights depend on `seed` alone, not on the cut.

    Args:
        config: of `gpt2_config`.
        stages: P; must divide the number of ranks.
        seed: of the initial weights.
        partition: DeepSpeed's `partition_method`: "parameters", "uniform" or "type:<regex>"; or a cut.
    """
    module = CutPipelineModule(
        gpt2_layers(config),
        num_stages=stages,
        loss_fn=next_token_loss,
        partition_method=partition,
        seed_layers=True,
        seed_fn=_seed_layer,
        base_seed=seed,
    )
    # Left on, it reseeds dropout at every forward from a counter that no checkpoint keeps.
    module.seed_layers = False
    return module


def _seed_layer(seed: int) -> None:
    # DeepSpeed's own default fails from Python 3.11 on: the seed that it makes is a numpy integer.
    torch.manual_seed(int(seed))


def _initialise(module: nn.Module, config: GPT2Config) -> None:
    module.apply(GPT2PreTrainedModel(config)._init_weights)

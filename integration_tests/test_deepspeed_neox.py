"""GPT-NeoX from a stock checkout (GPT_NEOX_CHECKOUT), started by its deepy.py, with docs/jobs.md's change of train.py.

It wants CUDA, which the CPU plays (`testing.megatron_cpu`).  Stand-ins replace the packages of other tokenizers and of
Weights & Biases, and the index of samples that its make file would compile into the checkout.
"""

import json
import re

import pytest

from integration_tests.public_programs import checkout, is_close_behind, keys, run, stubs
from testing.made_up import token_documents

pytestmark = pytest.mark.slow

STUBS = {
    "pkg_resources": "import packaging, packaging.version\n",
    "requests": "class utils:\n    get_netrc_auth = staticmethod(lambda host: None)\n",
    "sentencepiece": "",
    "transformers": "GPT2Tokenizer = GPT2TokenizerFast = None\n",
}
HELPERS = '''
import sys, types
import deepspeed.comm.torch, deepspeed.ops.adam
import numpy as np
import torch

torch.cuda.LongTensor = torch.LongTensor
deepspeed.ops.adam.FusedAdam = torch.optim.AdamW  # whose kernel is for CUDA
deepspeed.comm.torch.build_shm_op = lambda: None  # which would be compiled for the CUDA that the CPU plays

def build_sample_idx_int32(sizes, doc_idx, seq_length, num_epochs, tokens_per_epoch):
    """For every sample the document of its first token, and the token's place in it."""
    ends = np.cumsum(sizes[doc_idx], dtype=np.int64)
    first = np.arange((num_epochs * tokens_per_epoch - 1) // seq_length + 1) * seq_length
    document = np.searchsorted(ends, first, side="right")
    return np.stack([document, first - (ends - sizes[doc_idx])[document]], 1).astype(np.int32)

sys.modules["megatron.data.helpers"] = helpers = types.ModuleType("megatron.data.helpers")
helpers.build_sample_idx_int32 = build_sample_idx_int32
import megatron.data.data_utils, megatron.training
megatron.data.data_utils.compile_helper = lambda: None
# With pipes its evaluation fails, under 1F1B too: it wants a pair, and eval_batch returns a loss.
evaluated = megatron.training.forward_step
megatron.training.forward_step = lambda *args, **options: (evaluated(*args, **options), {})
'''

TINY = {
    **{"pipe_parallel_size": 2, "model_parallel_size": 1, "num_gpus": 2, "distributed_backend": "gloo"},
    **{"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32},
    **{"norm": "layernorm", "pos_emb": "rotary", "no_weight_tying": False, "tokenizer_type": "CharLevelTokenizer"},
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
    **{"min_lr": 1e-3, "lr_decay_style": "constant", "warmup": 0.01, "train_iters": 40, "lr_decay_iters": 40},
    "zero_optimization": {"stage": 1, "allgather_bucket_size": 100_000, "reduce_bucket_size": 100_000},
    **{"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "gradient_clipping": 1.0},
    **{"weight_decay": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    **{"precision": "bfloat16", "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    **{"checkpoint_factor": 20, "eval_interval": 10, "eval_iters": 2, "log_interval": 1, "steps_per_print": 10},
    **{"data_impl": "mmap", "split": "80,10,10", "num_workers": 0, "wall_clock_breakdown": True},
}


def registering(script, changed):
    """The recipe's change of train.py: two lines."""
    text = script.read_text()
    after, inside = "from megatron.training import pretrain\n", "def main(input_args=None, overwrite_values=None):\n"
    assert text.count(after) == text.count(inside) == 1
    text = text.replace(after, f"{after}import paci_schedule\n")
    changed.write_text(HELPERS + text.replace(inside, f'{inside}    paci_schedule.register("deepspeed")\n'))


def test_it_trains_evaluates_saves_and_resumes(tmp_path):
    """Tied, ZeRO-1, bf16 with sums in fp32, clipped globally, with `wall_clock_breakdown` as in most configs."""
    program = checkout("GPT_NEOX_CHECKOUT")
    token_documents(tmp_path / "tokens", words=127)
    registering(program / "train.py", tmp_path / "train.py")
    path = (stubs(tmp_path / "stubs", STUBS, plays_cuda=True), program)

    def pretrained(schedule, **settings):
        settings |= {"data_path": str(tmp_path / "tokens"), "deepspeed_extra_args": keys(schedule)}
        conf = tmp_path / "settings.yml"
        conf.write_text(json.dumps({**TINY, **settings}))
        said = run(program / "deepy.py", tmp_path / "train.py", conf, path=path, folder=tmp_path)
        assert ('DeepSpeed runs the schedule "paci" on P = 2 stages' in said) == (schedule != "1f1b")
        trained = re.findall(r"iteration +(\d+)/.*? lm_loss: (\S+)", said)
        validated = re.findall(r"validation results at iteration (\d+) .*?lm_loss value: (\S+)", said)
        return [{int(number): float(loss) for number, loss in found} for found in (trained, validated)]

    # DeepSpeed fails with wall_clock_breakdown, on all stages but one.
    stock, stock_validated = pretrained("1f1b", wall_clock_breakdown=False)
    assert pretrained("flushed") == [stock, stock_validated]  # so what differs below is the delay
    paci, validated = pretrained("paci", save=str(tmp_path / "saved"))
    assert list(paci) == list(range(1, 41))
    assert is_close_behind(validated, stock_validated), (validated, stock_validated)
    (tmp_path / "saved" / "latest").write_text("global_step20")
    resumed, again = pretrained("paci", load=str(tmp_path / "saved"))
    assert resumed == {number: paci[number] for number in range(21, 41)}
    assert again == {number: validated[number] for number in (30, 40)}

"""A training script for Megatron-Bridge, as its users write them: a recipe made small, overrides, `pretrain`.

python testing/bridge_job.py KEY=VALUE...
"""

import os
import sys

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
from megatron.bridge.recipes.gpt.vanilla_gpt import vanilla_gpt_pretrain_config
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
from megatron.core.transformer.enums import AttnBackend


class Marks(Callback):
    """Tells whoever records collectives how many iterations are done."""

    def on_train_step_start(self, context):
        os.environ["MEGATRON_CPU_ITERATION"] = str(context.state.train_state.step)


def small():
    """The recipe, made so small that a CPU trains it."""
    config = vanilla_gpt_pretrain_config()
    config.model = GPTModelProvider(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        seq_length=32,
        vocab_size=127,
        make_vocab_size_divisible_by=1,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        transformer_layer_spec=local_layer_spec,
        attention_backend=AttnBackend.unfused,
        masked_softmax_fusion=False,
        cross_entropy_loss_fusion=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    config.mixed_precision = None
    config.dataset.seq_length, config.dataset.split = 32, "90,5,5"
    config.dataset.num_workers, config.dataset.persistent_workers = 0, False
    config.tokenizer.vocab_size = 127
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = 6, 3, 1
    config.validation.eval_interval, config.validation.eval_iters = 100, 0
    config.checkpoint.save = config.checkpoint.load = None
    config.checkpoint.async_strategy = "mcore"
    config.logger.log_interval, config.logger.tensorboard_dir = 1, None
    config.optimizer.lr, config.optimizer.min_lr = 1e-2, 1e-3
    config.optimizer.bf16 = config.optimizer.use_distributed_optimizer = False
    config.scheduler.lr_warmup_iters, config.scheduler.lr_decay_style = 0, "constant"
    config.dist.distributed_backend = "gloo"
    return config


if __name__ == "__main__":
    config = process_config_with_overrides(small(), cli_overrides=sys.argv[1:])
    pretrain(config, forward_step, callbacks=[Marks()])

"""Megatron-LM's pretrain_gpt.py with a stand-in for Transformer Engine's FusedAdam, which needs a GPU.

Started as a script, with the checkout's folder in PYTHONPATH.  Megatron wants this optimizer for
``--use-precision-aware-optimizer``: it keeps the fp32 weights to itself, and takes its gradients from the attribute
``decoupled_grad`` of the weights.  This one leaves the arithmetic to PyTorch's AdamW.
"""

from __future__ import annotations

import runpy
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version


class FusedAdam(torch.optim.Optimizer):
    """As far as Megatron uses it."""

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool,
        exp_avg_dtype: torch.dtype,
        exp_avg_sq_dtype: torch.dtype,
        master_weights: bool,
        master_weight_dtype: torch.dtype,
        use_decoupled_grad: bool,
    ) -> None:
        assert (adam_w_mode, master_weights, use_decoupled_grad) == (True, True, True), "what a job in bf16 asks for"
        assert {exp_avg_dtype, exp_avg_sq_dtype, master_weight_dtype} == {torch.float32}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self._masters: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._adam: torch.optim.AdamW | None = None

    def step(self, closure: None = None) -> None:
        if self._adam is None:  # only now are the weights those of the checkpoint
            groups = [[(weight, weight.detach().float()) for weight in group["params"]] for group in self.param_groups]
            self._masters = [pair for group in groups for pair in group]
            self._adam = torch.optim.AdamW([{"params": [master for _, master in group]} for group in groups])
        for ours, theirs in zip(self._adam.param_groups, self.param_groups, strict=True):
            ours.update({name: theirs[name] for name in ("lr", "weight_decay", "betas", "eps")})
        for weight, master in self._masters:
            gradient = getattr(weight, "decoupled_grad", None)
            master.grad = None if gradient is None else gradient.float()
        self._adam.step()
        for weight, master in self._masters:
            weight.data.copy_(master)


def main() -> None:
    checkout = Path(import_module("megatron.training").__file__ or "").parents[2]
    sys.path.insert(0, str(checkout))
    import_module("megatron.training.training")  # and all that asks for Transformer Engine when it is imported
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        sys.modules[name] = types.ModuleType(name)
    for name in ("transformer_engine.pytorch.optimizers", "megatron.core.optimizer.distrib_optimizer"):
        vars(import_module(name)).update(FusedAdam=FusedAdam, Adam=FusedAdam)
    vars(import_module("megatron.core.optimizer")).update(Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False)
    vars(import_module("megatron.core.utils")).update(get_te_version=lambda: Version("2.0.0"))
    runpy.run_path(str(checkout / "pretrain_gpt.py"), run_name="__main__")


if __name__ == "__main__":
    main()

"""Megatron-LM's pretrain_gpt.py with a stand-in for Transformer Engine's FusedAdam, which needs a GPU.

Started as a script, with the checkout's folder in PYTHONPATH.  Megatron wants this optimizer for
``--use-precision-aware-optimizer``: it keeps the fp32 weights to itself, and takes its gradients from the attribute
``decoupled_grad`` of the weights.  This one leaves the arithmetic to PyTorch's AdamW.  With ``--optimizer-cpu-offload``
the half of the weights that is updated on the host is chosen as on a GPU.
"""

from __future__ import annotations

import runpy
import sys
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch.overrides import TorchFunctionMode


class FusedAdam(torch.optim.Optimizer):
    """As far as Megatron uses it: with fp32 weights of its own for weights in bf16, or without, for weights in fp32."""

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
    ) -> None:
        assert adam_w_mode
        assert master_weights == use_decoupled_grad, "what a job in bf16 asks for"
        assert {exp_avg_dtype, exp_avg_sq_dtype, master_weight_dtype} == {torch.float32}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self._has_masters = master_weights
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
            gradient = getattr(weight, "decoupled_grad" if self._has_masters else "grad", None)
            master.grad = None if gradient is None else gradient.float()
        self._adam.step()
        for weight, master in self._masters:
            weight.data.copy_(master)


class _PinnedIsOnHost(TorchFunctionMode):
    """A tensor that was pinned counts as one on the host, and all others as on the device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func == torch.Tensor.is_cuda.__get__:
            return not getattr(args[0], "is_on_host", False)
        result = func(*args, **(kwargs or {}))
        copies = func in (torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.float)
        if func is torch.Tensor.pin_memory or (copies and hasattr(args[0], "is_on_host")):
            result.is_on_host = True
        return result


def share_out(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's choice of the weights that are updated on the host, where both are the same."""

    def shared(*args: Any) -> Any:
        with _PinnedIsOnHost():
            found = stock(*args)
        on_host, on_device = (sum(len(group["params"]) for group in groups) for groups in found[:2])
        print(f"\nof {on_host + on_device} weights {on_host} are updated on the host\n", end="", flush=True)
        return found

    return shared


def main() -> None:
    checkout = Path(import_module("megatron.training").__file__ or "").parents[2]
    sys.path.insert(0, str(checkout))
    import_module("megatron.training.training")  # and all that asks for Transformer Engine when it is imported
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        sys.modules[name] = types.ModuleType(name)
    for name in ("transformer_engine.pytorch.optimizers", "megatron.core.optimizer.distrib_optimizer"):
        vars(import_module(name)).update(FusedAdam=FusedAdam, Adam=FusedAdam)
    hybrid: Any = import_module("megatron.core.optimizer.cpu_offloading.hybrid_optimizer").HybridDeviceOptimizer
    hybrid._get_sub_optimizer_param_groups = share_out(hybrid._get_sub_optimizer_param_groups)
    begin = hybrid.__init__
    # PyTorch's fused AdamW rounds otherwise.
    hybrid.__init__ = lambda *args, **options: begin(*args, **{**options, "fused": False})
    vars(import_module("megatron.core.optimizer")).update(Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False)
    vars(import_module("megatron.core.utils")).update(get_te_version=lambda: Version("2.0.0"))
    runpy.run_path(str(checkout / "pretrain_gpt.py"), run_name="__main__")


if __name__ == "__main__":
    main()

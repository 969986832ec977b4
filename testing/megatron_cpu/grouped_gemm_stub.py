"""A stand-in for grouped_gemm, whose kernels Megatron-core 0.16.1 takes for experts of ``--moe-grouped-gemm``."""

from __future__ import annotations

import sys
import types

import torch

__all__ = ["install"]


def gmm(tokens: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, trans_b: bool = False) -> torch.Tensor:
    """Every expert's tokens times its weights: [tokens, in], [experts, in, out], int64[experts] -> [tokens, out]."""
    parts = tokens.split(counts.tolist())
    matrices = weights.transpose(1, 2) if trans_b else weights
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


def install() -> None:
    """Make it importable."""
    module = types.ModuleType("grouped_gemm")
    module.ops = types.SimpleNamespace(gmm=gmm)  # pyright: ignore[reportAttributeAccessIssue]: it is a module made here
    sys.modules.setdefault("grouped_gemm", module)

"""Low-precision weights with fp32 masters for a rehearsal, as mixed-precision engines keep them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from paci_schedule.errors import UnsupportedError

__all__ = ["with_masters"]

_SUMS_IN_FP32 = hasattr(torch.Tensor, "grad_dtype")


def with_masters(base: type[Any]) -> type[Any]:
    """A class like the optimizer `base` that steps fp32 copies of its parameters and casts them back after each step.

    The parameters' gradients are summed in fp32.  `base` must treat every parameter by itself, which predictions need
    anyway.

    Raises:
        UnsupportedError: this torch cannot sum the gradients of a low-precision parameter in fp32.
    """
    if not _SUMS_IN_FP32:
        raise UnsupportedError(
            f"torch {torch.__version__} sums the gradients of a bf16 weight in bf16, which no engine does; take torch "
            "2.10 or later, or fp32 weights"
        )

    class WithMasters(base):
        def __init__(self, params: Iterable[Any], *args: Any, **kwargs: Any) -> None:
            super().__init__(params, *args, **kwargs)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad_dtype = torch.float32

        @torch.no_grad()
        def step(self) -> None:
            kept, self.state = self.state, defaultdict(dict)
            working = [group["params"] for group in self.param_groups]
            for group, parameters in zip(self.param_groups, working, strict=True):
                group["params"] = [self._master(parameter, kept) for parameter in parameters if _has_part(parameter)]
            super().step()
            for group, parameters in zip(self.param_groups, working, strict=True):
                stepped = filter(_has_part, parameters)
                for parameter, master in zip(stepped, group["params"], strict=True):
                    parameter.copy_(master)
                    kept[parameter] = {**self.state[master], "master": master}
                    master.grad = None
                group["params"] = parameters
            self.state = kept

        def _master(self, parameter: torch.Tensor, kept: dict[torch.Tensor, dict[str, Any]]) -> torch.Tensor:
            state = dict(kept[parameter])
            master = state.pop("master", None)
            if master is None:
                master = parameter.to(torch.float32, copy=True)
            master.grad = parameter.grad
            if state:
                self.state[master] = state
            return master

    return WithMasters


def _has_part(parameter: torch.Tensor) -> bool:
    return parameter.grad is not None

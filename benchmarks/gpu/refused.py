"""What PACI refuses on Megatron because only a GPU can tell whether it fits: would it?  Nobody has run this step yet.

It needs a Megatron-LM checkout (MEGATRON_LM_CHECKOUT) and Transformer Engine.  Each job trains a tiny model on two
stages that share the GPU, at a learning rate of 0 and then at a real one: under PACI with the refusal lifted, and under
Megatron's own schedule.  At a rate of 0 the losses have to be those of the stock schedule; at a real one they have to
be finite, because nothing else is known of them.
"""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.gpu.place import Failed, Place, Unavailable
from testing.megatron_lm import logged, pretrained

__all__ = ["CASES", "run"]

_COMMON = (
    "--transformer-impl transformer_engine --bf16 --clip-grad 0 --train-iters 6 --eval-iters 0 --eval-interval 100 "
    "--untie-embeddings-and-output-weights"
)
CASES = {
    "fp8": ("--fp8-format hybrid --hidden-size 64 --ffn-hidden-size 128", "fp8"),
    "CUDA graphs": ("--cuda-graph-impl local --te-rng-tracker", "cuda_graph_impl"),
    "activation offloading": (
        "--fine-grained-activation-offloading --offload-modules core_attn",
        "fine_grained_activation_offloading",
    ),
}
"""Flags of a job, and the setting whose refusal is lifted for it."""


def run(place: Place) -> dict[str, Any]:
    """By job, what came of it; raises where a loss is not the stock schedule's, or not finite."""
    place.require_gpu("Transformer Engine's kernels")
    checkout = os.environ.get("MEGATRON_LM_CHECKOUT", "").partition(os.pathsep)[0]
    if not checkout or find_spec("transformer_engine") is None:
        raise Unavailable("needs Transformer Engine, and MEGATRON_LM_CHECKOUT to name a Megatron-LM checkout")
    figures: dict[str, Any] = {}
    wrong = []
    for name, (flags, lifted) in CASES.items():
        still, stock, moving = (
            _losses(checkout, schedule, f"{_COMMON} {flags} --lr {rate} --min-lr {rate}", lifted)
            for schedule, rate in (("paci", "0"), ("1f1b", "0"), ("paci", "1e-3"))
        )
        figures[name] = {"PACI, rate 0": still, "stock, rate 0": stock, "PACI, rate 1e-3": moving}
        if isinstance(stock, str):
            figures[name]["so"] = "stock does not run it here"
        elif still != stock or isinstance(moving, str) or not all(map(math.isfinite, moving)):
            wrong.append(name)
    if wrong:
        raise Failed(f"the refusals of these are needed: {', '.join(wrong)}", figures)
    return figures


def _losses(checkout: str, schedule: str, flags: str, lifted: str) -> list[float] | str:
    """The losses of the iterations; what the job said last, if it failed."""
    with mock.patch.dict(os.environ, PACI_LIFTED=lifted):
        done = pretrained(checkout, schedule, 2, flags, script=Path(__file__).with_name("lifted.py"))
    return done.stdout[-800:] if done.returncode else [float(line[2]) for line in logged(done.stdout).values()]

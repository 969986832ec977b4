"""What a prediction costs beside the compute: a GPT block's forward and backward, an optimizer step, a prediction.

    python -m benchmarks.prediction_cost [--device cuda --dtype bf16 --widths 2048,4096 --tokens 8192]

Medians of turns that alternate.  The last columns are what predictions and the update add to the time of an update of
the first stage at P = a = 8, the stage with the most stale forwards: seven of eight.  The optimizer steps the weights
themselves, as in fp32 without ZeRO; where replicas share the optimizer's state, each predicts its share only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from paci_schedule.predict import SteppedWeights
from paci_schedule.rehearse import gpt, with_masters

_STALE, _ACCUMULATION = 7, 8
_CONTEXT = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", help="fp32 or bf16, of the weights")
    parser.add_argument("--widths", default="48,384,768")
    parser.add_argument("--tokens", default="256,2048", help="of a micro-batch")
    parser.add_argument("--turns", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shown = Table(
        "width",
        "tokens",
        "optimizer",
        "F + B",
        "step",
        "prediction",
        "every",
        "window",
        title=f"milliseconds, {arguments.device}, {arguments.dtype}",
    )
    for width in map(int, arguments.widths.split(",")):
        for tokens in map(int, arguments.tokens.split(",")):
            for name in ("adamw", "muon"):
                compute, step, prediction = _milliseconds(width, tokens, name, arguments)
                update = _ACCUMULATION * compute + step
                shares = [f"{count * prediction / update:.1%}" for count in (_STALE, 1)]
                figures = (f"{value:.2f}" for value in (compute, step, prediction))
                shown.add_row(str(width), str(tokens), name, *figures, *shares)
    Console().print(shown)


def _milliseconds(width: int, tokens: int, name: str, arguments: argparse.Namespace) -> list[float]:
    """Of a block: forward and backward of a micro-batch, the optimizers' step, a prediction and its end."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    block = gpt.stages(1, 1, width, _CONTEXT, 2, 0)[0][1].to(arguments.device, dtype)
    matrices = [parameter for parameter in block.parameters() if parameter.ndim == 2 and name == "muon"]
    others = [parameter for parameter in block.parameters() if all(parameter is not each for each in matrices)]
    kept = with_masters if arguments.dtype == "bf16" else lambda base: base
    optimizers = [kept(torch.optim.AdamW)(others, lr=1e-4)]
    if matrices:
        optimizers.append(kept(torch.optim.Muon)(matrices, lr=1e-4))
    weights = SteppedWeights(optimizers)
    shape = tokens // _CONTEXT, _CONTEXT, width
    inputs = torch.randn(shape, device=arguments.device, dtype=dtype, requires_grad=True)
    ahead = torch.randn_like(inputs)

    def compute() -> None:
        block(inputs).backward(ahead)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    def predict() -> None:
        weights.predict(1, 2.0, None, 1.0)
        weights.restore()

    turns: list[list[float]] = [[], [], []]
    for _ in range(arguments.turns):
        for seconds, action in zip(turns, (compute, step, predict), strict=True):
            seconds.append(_seconds(action, arguments.device))
    return [1e3 * statistics.median(seconds[1:]) for seconds in turns]


def _seconds(action: Callable[[], None], device: str) -> float:
    def wait() -> None:
        if device != "cpu":
            torch.accelerator.synchronize()

    wait()
    started = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

"""`paci profile`: measure a model's layers on this machine, for `paci plan --layers`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from paci_schedule.errors import ConfigError
from paci_schedule.plan.models import write_layers

__all__ = ["profile"]

_NEEDED = "micro_batch", "sequence_length"


@click.command()
@click.argument("source", metavar="FILE.py:FUNCTION")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="The JSON file to write.",
)
@click.option("--bf16", is_flag=True, help="Measure the layers in bf16.")
@click.option(
    "--repeats", type=click.IntRange(1), default=5, metavar="N", help="How often each layer is timed (default 5)."
)
def profile(source: str, output: Path, bf16: bool, repeats: int) -> None:
    """Measure what each layer of a DeepSpeed pipeline or a Megatron model costs on this machine's device.

    FUNCTION takes no arguments and returns a dictionary with "micro_batch" (inputs and labels, as the data iterator
    yields them), "sequence_length", and either "layers" (as a PipelineModule takes them), with "loss_fn" if there is
    one, or "model" (a whole GPTModel of megatron-core on its device).  The file that is written is what `paci plan
    --layers` reads.
    """
    given = _call(_function(source), source)
    import torch

    measuring: dict[str, Any] = {"dtype": torch.bfloat16 if bf16 else None, "repeats": repeats}
    if "model" in given:
        from paci_schedule.adapters.megatron.profiling import layer_costs as costs_of_model

        costs = costs_of_model(given["model"], given["micro_batch"], **measuring)
    else:
        from paci_schedule.adapters.deepspeed import layer_costs

        costs = layer_costs(given["layers"], given["micro_batch"], loss_fn=given.get("loss_fn"), **measuring)
    inputs = given["micro_batch"][0]
    first = inputs[0] if isinstance(inputs, (tuple, list)) else inputs
    write_layers(output, costs, given["sequence_length"], len(first))
    seconds = sum(cost.forward + cost.backward for cost in costs)
    click.echo(f"{len(costs)} layers, {seconds:.4g} s a micro-batch of {len(first)}: paci plan --layers {output}")


def _function(source: str) -> Callable[[], Any]:
    """The function that FILE.py:FUNCTION names."""
    file, _, name = source.rpartition(":")
    path = Path(file)
    if not name or not path.is_file():
        raise ConfigError(f"source={source!r}: must be FILE.py:FUNCTION, and the file must exist")
    spec = importlib.util.spec_from_file_location("paci_profiled", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"source={source!r}: is no file of Python; name one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"source={source!r}: {type(error).__name__}: {error}; correct the file") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"source={source!r}: the file has no function {name}; name one that it has")
    return found


def _call(function: Callable[[], Any], source: str) -> dict[str, Any]:
    """What the function describes."""
    try:
        given = function()
    except Exception as error:
        raise ConfigError(f"source={source!r}: {type(error).__name__}: {error}; correct the function") from error
    if not isinstance(given, dict) or not given.keys() >= set(_NEEDED) or ("layers" in given) == ("model" in given):
        raise ConfigError(
            f"source={source!r}: the function must return a dictionary with {', '.join(_NEEDED)}, and either layers or "
            "model"
        )
    return given

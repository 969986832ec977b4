"""The profile of a model: what each layer costs, measured on the device that will run it.

The layers run one after the other on a sample micro-batch; each takes what the layer before it returned.  Forward and
backward run as in a pipeline stage: gradients are added to those that are there, and the inputs of all layers but the
first get a gradient.  Only one layer is on the device at a time, so a model may be larger than the device.

The seconds are the least of several runs, because a disturbance can only make a run longer.  On CUDA they are taken
between events in the device's stream, on the CPU by the host's clock.  The bytes are those of the tensors that ops
make: what the forward leaves behind is saved for the backward, and the rest is workspace.  The scratch memory inside a
kernel is not seen.  A layer that recomputes itself is measured as it is: its backward is longer, and it saves little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from paci_schedule.errors import ConfigError
from paci_schedule.measure.live_bytes import LiveBytes
from paci_schedule.plan.layers import Layer
from paci_schedule.runtime.message import Layout, Payload

__all__ = ["Runnable", "profile_layers"]

Runnable = Callable[[Payload], Payload]
"""A module, or a function without parameters, that takes what the layer before returns."""


def profile_layers(
    layers: Iterable[Runnable],
    sample: Payload,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    repeats: int = 5,
) -> list[Layer]:
    """The cost of each layer, in order.  Torch's random state is as it was before the first layer was made.

    Args:
        layers: those of the whole model, in order.  They are taken one at a time, so large ones should be made on the
            way.  A module is moved to the device, and gradients are added to it: pass a copy if it is still needed.
        sample: the inputs of the first layer, for one micro-batch.
        device: the device to measure on.
        dtype: the type of the modules' floating-point parameters and buffers; None leaves them as they are.
        repeats: how often a layer is timed, after two runs that are not timed.

    Raises:
        ConfigError: a layer does not run on what it gets, or `repeats` is less than 1.
    """
    if repeats < 1:
        raise ConfigError(f"repeats={repeats!r}: must be at least 1")
    sample = tuple(sample) if isinstance(sample, list) else sample
    if not all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(sample)):
        raise ConfigError(f"sample={sample!r}: must be a tensor or a tuple of tensors, one micro-batch of inputs")
    costs: list[Layer] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        inputs = tree_map(lambda tensor: tensor.detach().to(device), sample)
        for layer in layers:
            if isinstance(layer, nn.Module):
                layer.to(device=device, dtype=dtype).train()
            try:
                cost, inputs = _measure(layer, inputs, device, repeats, first=not costs)
            except Exception as error:
                name = getattr(layer, "__name__", type(layer).__name__)
                raise ConfigError(
                    f"layer {len(costs)}, {name}, fails on {Layout.of(inputs)}: {type(error).__name__}: {error}; "
                    "correct the layer, or the sample: one micro-batch as the data iterator yields it"
                ) from error
            costs.append(cost)
            del layer  # before the next one is made
    return costs


def _measure(
    layer: Runnable, inputs: Payload, device: torch.device, repeats: int, first: bool
) -> tuple[Layer, Payload]:
    """The layer's costs, and its outputs."""

    def fresh() -> Payload:
        # A clone is no leaf, so a layer may change it in place, as it may change the output of another layer.
        return tree_map(
            lambda tensor: tensor.detach().requires_grad_(not first and tensor.is_floating_point()).clone(), inputs
        )

    gradients = _backward(layer(fresh()))  # parameters have gradients from here on, as in a job that runs
    given = fresh()
    with LiveBytes() as counter:
        outputs = layer(given)
        kept = counter.live
        _backward(outputs, gradients)
    handed_on = sum(tensor.nbytes for tensor in tree_leaves(outputs) if tensor in counter)
    # As in a pipeline, another forward lies between a micro-batch's forward and its backward, so caches are not warm.
    marks, behind = [], layer(fresh())
    for _ in range(repeats):
        given = fresh()
        begin = _mark(device)
        results = layer(given)
        middle = _mark(device)
        _backward(behind, gradients)
        marks.append((begin, middle, _mark(device)))
        behind = results
    own = list(chain(layer.parameters(), layer.buffers())) if isinstance(layer, nn.Module) else []
    cost = Layer(
        forward=min(_seconds(begin, middle) for begin, middle, _ in marks),
        backward=min(_seconds(middle, end) for _, middle, end in marks),
        input_bytes=sum(tensor.nbytes for tensor in tree_leaves(inputs)),
        saved_bytes=max(0, kept - handed_on),
        workspace_bytes=counter.peak - kept,
        output_bytes=sum(tensor.nbytes for tensor in tree_leaves(outputs)),
        parameters=sum(one.numel() for one in own if one.requires_grad),
        frozen_bytes=sum(one.nbytes for one in own if not one.requires_grad),
    )
    return cost, tree_map(torch.Tensor.detach, outputs)


def _backward(outputs: Payload, gradients: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Run the backward from the outputs; returns the gradients that it began with, ones unless they are given."""
    differentiable = [tensor for tensor in tree_leaves(outputs) if tensor.requires_grad]
    if gradients is None:
        gradients = [torch.ones_like(tensor) for tensor in differentiable]
    if differentiable:
        torch.autograd.backward(differentiable, gradients)
    return gradients


def _mark(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float | int):
        assert isinstance(end, float), "both marks are of one device"
        return end - begin
    assert not isinstance(end, float | int), "both marks are of one device"
    end.synchronize()
    return begin.elapsed_time(end) / 1e3

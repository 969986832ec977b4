"""Uneven stages: measure each layer, find the partition with the fastest slowest stage, hand it to DeepSpeed.

DeepSpeed's own methods count layers ("uniform", "type:regex") or parameters ("parameters").  But an embedding has many
parameters and hardly anything to compute, and a head with its loss takes as long as several blocks.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import nn

from paci_schedule.adapters.deepspeed.device import current_device, take_device
from paci_schedule.core.files import read_json
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError, PaciError
from paci_schedule.measure.profile import Runnable, profile_layers
from paci_schedule.plan.layers import Layer
from paci_schedule.plan.partition import Partition, balance, check_bounds, memory_of_stages

__all__ = ["CutPipelineModule", "balanced_cut", "layer_costs"]

logger = logging.getLogger(__name__)

_LARGEST = 1 << 20  # bytes of a partition
_FoundT = TypeVar("_FoundT")


class CutPipelineModule(PipelineModule):
    """DeepSpeed's PipelineModule, whose `partition_method` may also be a measured partition.

    Args:
        partition_method: a `Partition`, such as `balanced_cut` returns, or its bounds: P + 1 layer numbers from 0 to n,
            where each stage begins and the last one ends; the same on every rank.  A string is DeepSpeed's own method.

    Raises:
        ConfigError: the bounds do not cut these layers into these stages.
    """

    num_stages: int

    def _partition_layers(self, method: str | Partition | Sequence[int] = "uniform") -> None:
        if isinstance(method, str):
            super()._partition_layers(method)
            return
        bounds = method.bounds if isinstance(method, Partition) else method
        check_bounds(bounds, self._num_layers, self.num_stages)
        self.parts = list(bounds)
        self._set_bounds(*self.parts[self.stage_id : self.stage_id + 2])


def balanced_cut(
    layers: Sequence[Any],
    micro_batch: tuple[Any, Any],
    *,
    num_stages: int | None = None,
    topology: ProcessTopology | None = None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    activation_checkpoint_interval: int = 0,
    memory_limit: int | Sequence[int] | None = None,
    bytes_per_parameter: float = 16.0,
    extra_in_flight: int | tuple[int, ...] = 0,
    file: str | Path | None = None,
    **measuring: Any,
) -> Partition:
    """The partition with the fastest slowest stage for this model, measured on this machine; the same on every rank.

        cut = balanced_cut(layers, next(iter(loader)), num_stages=8, loss_fn=loss)
        module = CutPipelineModule(layers, num_stages=8, loss_fn=loss, partition_method=cut)

    Every rank calls it.  Rank 0 measures, with the ranks of its tensor-parallel group if `topology` has one; the others
    wait, so that they do not disturb it.  Layers are made one at a time and thrown away; torch's random state stays.

    Args:
        layers, num_stages, topology, loss_fn, activation_checkpoint_interval: as of the PipelineModule.
        micro_batch: inputs and labels, as the data iterator yields them.
        memory_limit: bytes that a stage may take, one number for all or one for each; see `partition.evaluate` for what
            is counted, and leave room for the rest.  None for no limit.
        bytes_per_parameter: of a trained parameter's weight, gradient and optimizer states together: 16 for Adam in
            fp32, and for bf16 weights and gradients with Adam on fp32 copies.
        extra_in_flight: as in the block ``"paci"`` of the config; counts for the memory.
        file: JSON from which the partition is read if it exists, and to which it is written if not.  Optimizer states
            are saved by stage, so a resumed run needs the partition of the run before it, not one measured anew.
        measuring: dtype and repeats of `layer_costs`.

    Raises:
        ConfigError: a layer fails on the micro-batch, no partition keeps to the limit, or the file's partition is
            of another model.
        PaciError: on the other ranks, when one could not measure.
    """
    stages: Any = num_stages if topology is None else topology.get_dim("pipe")  # the spec refuses None
    spec = PipelineSpec(stages=stages, accumulation=1, extra_in_flight=extra_in_flight)
    memories = memory_of_stages(spec, bytes_per_parameter=bytes_per_parameter, memory_limit=memory_limit)
    take_device()

    def measure() -> Partition:
        costs = layer_costs(layers, micro_batch, loss_fn=loss_fn, **measuring)
        return balance(costs, memories, recompute_every=activation_checkpoint_interval)

    cut = None if file is None else _shared(lambda: _read(Path(file), len(layers), spec.stages), [0])
    if cut is None:
        cut = _shared(measure, _measuring_ranks(topology))
        if file is not None and dist.get_rank() == 0:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text(json.dumps(asdict(cut)), encoding="utf-8")
    if dist.get_rank() == 0:
        logger.info("%s", cut)
    return cut


def layer_costs(
    layers: Iterable[Any],
    micro_batch: tuple[Any, Any],
    *,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    **measuring: Any,
) -> list[Layer]:
    """What each layer of a pipeline model costs on this rank's device, the loss counted with the last one.

    Args:
        layers: modules, LayerSpecs, TiedLayerSpecs or functions, as a PipelineModule takes them; left as they are.
        micro_batch: inputs and labels, as the data iterator yields them.
        loss_fn: of outputs and labels.
        measuring: dtype and repeats of `measure.profile.profile_layers`.

    Raises:
        ConfigError: a layer fails on the micro-batch.
    """
    specs = list(layers)
    device = current_device()
    inputs, labels = micro_batch
    if loss_fn is not None:
        labels = tuple(one.to(device) for one in labels) if isinstance(labels, (tuple, list)) else labels.to(device)
    made = _made(specs, [lambda outputs: loss_fn(outputs, labels)] if loss_fn is not None else [])
    costs = profile_layers(made, inputs, device, **measuring)
    if loss_fn is not None:
        costs[-2:] = [_together(*costs[-2:])]
    keys = [spec.key if isinstance(spec, TiedLayerSpec) else None for spec in specs]
    return [replace(cost, tied=key) for cost, key in zip(costs, keys, strict=True)]


class _Tied(nn.Module):
    """A layer of a tied module, as its `forward_fn` uses it."""

    def __init__(self, spec: TiedLayerSpec) -> None:
        super().__init__()
        self.module, self._forward = spec.build(), spec.forward_fn

    def forward(self, inputs: Any) -> Any:
        return self.module(inputs) if self._forward is None else self._forward(self.module, inputs)


def _made(specs: Iterable[Any], further: Iterable[Runnable]) -> Iterator[Runnable]:
    """The layers, each made when it is asked for; copies of those that are made already."""
    for spec in specs:
        if isinstance(spec, TiedLayerSpec):
            yield _Tied(spec)
        elif isinstance(spec, LayerSpec):
            yield spec.build()
        else:
            yield _copy(spec) if isinstance(spec, nn.Module) else spec
    yield from further


def _copy(module: nn.Module) -> nn.Module:
    """A copy with weights of its own; process groups cannot be copied, it has the same."""
    held = (value for part in module.modules() for value in vars(part).values())
    return copy.deepcopy(module, {id(value): value for value in held if isinstance(value, dist.ProcessGroup)})


def _together(layer: Layer, loss: Layer) -> Layer:
    """The last layer and the loss as one.  The loss is never recomputed, so its forward counts with the backward."""
    return replace(
        layer,
        backward=layer.backward + loss.forward + loss.backward,
        saved_bytes=layer.saved_bytes + loss.input_bytes + loss.saved_bytes,
        workspace_bytes=max(layer.workspace_bytes, loss.workspace_bytes),
        output_bytes=loss.output_bytes,
    )


def _measuring_ranks(topology: ProcessTopology | None) -> list[int]:
    """Rank 0, and the ranks that it shares its layers with."""
    if topology is None:
        return [0]
    return topology.filter_match(**{axis: 0 for axis in topology.get_axis_names() if axis in ("pipe", "data")})


def _shared(find: Callable[[], _FoundT], ranks: Sequence[int]) -> _FoundT:
    """What the first of `ranks` found, handed to every rank; if one of `ranks` failed, an error on every rank."""
    found: tuple[_FoundT | None, Exception | None] = None, None
    if dist.get_rank() in ranks:
        try:
            found = find(), None
        except Exception as error:
            found = None, error
    gathered: list[tuple[Any, str | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(gathered, (found[0], None if found[1] is None else str(found[1])))
    if found[1] is not None:
        raise found[1]
    for rank, (_, failure) in enumerate(gathered):
        if failure is not None:
            raise PaciError(f"rank {rank} found no partition: {failure}")
    return gathered[0][0]


def _read(path: Path, layers: int, stages: int) -> Partition | None:
    """The partition in the file; None if there is no file."""
    if not path.exists():
        return None
    try:
        known = read_json(path, _LARGEST)
        cut = Partition(**{field.name: tuple(known[field.name]) for field in fields(Partition)})
        check_bounds(cut.bounds, layers, stages)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"file={str(path)!r}: holds no partition of this model ({error}); remove it to measure anew"
        ) from error
    return cut

"""The devices of a job: how fast they compute, what they hold, and the links inside and between their nodes.

The figures of the presets are those of NVIDIA's public data sheets: dense bf16 operations per second, bandwidth of the
device's memory, its size, NVLink in one direction, and one network adapter for each device.  Three more figures are not
on any data sheet.  They were fitted to twelve published speeds of Megatron-LM on A100s; `reach` of the other
devices is an assumption, and docs/planning.md says how far off it is:

* the utilisation: a matrix product of a micro-batch of n tokens reaches n / (n + 64) of `reach` of the peak;
* `_NVLINK_SHARE` of the bandwidth of NVLink is what collectives of tensor parallelism reach;
* the bytes that a layer moves besides its matrix products (`plan.transformer`).

The reserve is memory that no tensor gets: the CUDA context, the buffers of NCCL's communicators, the libraries'
workspaces, and what the allocator wastes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from types import MappingProxyType

from paci_schedule.errors import ConfigError, nearest

__all__ = ["Device", "Link", "preset", "presets"]

GIB = 2**30
_TOKENS = 64  # of a micro-batch, with which a matrix product reaches half of what it can
_NVLINK_SHARE = 0.8
_RESERVE = 3 * GIB


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link between two devices, in one direction."""

    bandwidth: float = inf
    """Bytes per second."""

    latency: float = 0.0
    """Seconds that a message is on its way, whatever its size."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One of the devices of a job, which are all alike.

    Raises:
        ConfigError: a value is out of its range.
    """

    memory: float
    """Bytes of its memory."""

    flops: float = 1.0
    """Operations per second that matrix products of large micro-batches reach.  For measured layers: how many times as
    fast a device is as the one that they were measured on."""

    saturation: float = 0.0
    """Tokens of a micro-batch with which matrix products reach half of `flops`; 0 where the size does not matter."""

    memory_bandwidth: float = inf
    """Bytes that it reads and writes in a second."""

    reserve: float = 0.0
    """Bytes of the memory that no tensor gets."""

    node: int = 0
    """Devices of one node; 0 where all links are alike."""

    inside: Link = Link()
    """The links between devices of a node."""

    between: Link = Link()
    """The links between devices of different nodes."""

    def __post_init__(self) -> None:
        for name in ("memory", "flops", "memory_bandwidth"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be more than 0")
        if self.flops == inf:
            raise ConfigError(f"flops={self.flops}: must be finite; give what a device really does")
        if self.memory <= self.reserve:
            raise ConfigError(
                f"memory={self.memory / GIB:g} GiB: {self.reserve / GIB:g} GiB of it are reserved; give more"
            )

    @property
    def usable(self) -> float:
        """Bytes of the memory that tensors get."""
        return self.memory - self.reserve

    def seconds(self, operations: float, tokens: float, moved: float = 0.0) -> float:
        """What operations of matrix products of a micro-batch of `tokens`, and `moved` bytes besides, take."""
        return operations / self.flops * (1 + self.saturation / tokens) + moved / self.memory_bandwidth

    def link(self, first: int, second: int) -> Link:
        """The link between two ranks, which fill the nodes one after the other."""
        return self.inside if not self.node or first // self.node == second // self.node else self.between

    def ring(self, ranks: range) -> Link:
        """The slowest link of a ring of ranks."""
        return self.link(ranks[0], ranks[-1])


def _of_data_sheet(
    tera: float, reach: float, memory: float, memory_terabytes: float, nvlink: float, network: float, node: int = 8
) -> Device:
    """A device by its data sheet: tera operations a second, GiB, gigabytes a second in one direction, and the devices
    that NVLink connects."""
    return Device(
        memory=memory * GIB,
        flops=tera * 1e12 * reach,
        saturation=_TOKENS,
        memory_bandwidth=memory_terabytes * 1e12,
        reserve=_RESERVE,
        node=node,
        inside=Link(bandwidth=nvlink * 1e9 * _NVLINK_SHARE, latency=5e-6),
        between=Link(bandwidth=network * 1e9, latency=10e-6),
    )


_PRESETS = MappingProxyType(
    {
        "a100-40gb": _of_data_sheet(312, 0.714, 40, 1.555, 300, 25),
        "a100": _of_data_sheet(312, 0.714, 80, 2.039, 300, 25),
        "h100": _of_data_sheet(989.4, 0.65, 80, 3.35, 450, 50),
        "h200": _of_data_sheet(989.4, 0.65, 141, 4.8, 450, 50),
        "b200": _of_data_sheet(2250, 0.65, 180, 8.0, 900, 50),
        "gb200": _of_data_sheet(2450, 0.65, 186, 8.0, 900, 50, node=72),
        "b300": _of_data_sheet(2250, 0.65, 270, 8.0, 900, 100),
        "gb300": _of_data_sheet(2500, 0.65, 278, 8.0, 900, 100, node=72),
    }
)
# The SXM devices of these names in nodes of 8, or in racks of 72 that NVLink connects: A100 with HDR InfiniBand, B300
# and GB300 with ConnectX-8, the others with NDR.  2450 for GB200 is what NVIDIA's own benchmarks divide by.


def presets() -> tuple[str, ...]:
    """The names of the known devices."""
    return tuple(_PRESETS)


def preset(name: str) -> Device:
    """The device called `name`.  Raises ConfigError where there is none."""
    if name.lower() not in _PRESETS:
        raise ConfigError(f"gpu={name!r}: must be one of {nearest(name, _PRESETS)}; or give --tflops and --memory")
    return _PRESETS[name.lower()]

"""What the planner is asked, and what it answers: a job, and the rows of ways to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from paci_schedule.core.schedules.registry import SCHEDULES, schedule
from paci_schedule.core.staleness import interval_of
from paci_schedule.errors import ConfigError
from paci_schedule.plan.hardware import Device
from paci_schedule.plan.models import Model

__all__ = ["DATA_PARALLEL", "Job", "Row"]

_MOST = 10_000_000  # devices, samples of a batch

DATA_PARALLEL = "data parallel"
"""What a row of one stage is called, where every schedule is the same."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, on which devices, and what the search may choose.

    Raises:
        ConfigError: a value is out of its range.
    """

    model: Model
    """The layers to divide."""

    device: Device
    """One of the devices, which are all alike."""

    devices: int
    """The number of devices."""

    global_batch: int
    """The number of sequences in an optimizer update."""

    zero: int = 1
    """ZeRO stage of the optimizer state: 0 or 1."""

    overlap: bool = False
    """Whether replicas reduce their gradients while the last micro-batch's backward runs."""

    max_drift: int = 1
    """The most updates between a forward and its backward."""

    schedules: Sequence[str] = tuple(name for name in SCHEDULES if schedule(name).planned)
    """The schedules to search."""

    stages: Sequence[int] = ()
    """The numbers of stages to search; empty means every divisor of the devices."""

    slices: Sequence[int] = (1,)
    """The degrees of tensor parallelism to search."""

    micro_batch_sizes: Sequence[int] = ()
    """The micro-batch sizes to search, in sequences; empty means every power of 2 that divides a replica's share."""

    recompute: Sequence[bool] = (False, True)
    """Whether layers are recomputed in the backward."""

    prediction: str | int = "off"
    """When PACI predicts the weights of stale forwards (`core.staleness.interval_of`)."""

    def __post_init__(self) -> None:
        for name in ("devices", "global_batch"):
            if not 0 < getattr(self, name) <= _MOST:
                raise ConfigError(f"{name}={getattr(self, name)}: must be more than 0 and at most {_MOST}")
        if self.max_drift < 0:
            raise ConfigError(f"max_drift={self.max_drift}: must be at least 0")
        if self.zero not in (0, 1):
            raise ConfigError(f"zero={self.zero}: pipelines run with ZeRO stage 0 or 1; take one of them")
        for stages in self.stages:
            if stages < 1 or self.devices % stages:
                raise ConfigError(f"stages={stages}: must divide the {self.devices} devices")
        for slices in self.slices:
            if slices < 1 or self.devices % slices or (self.device.node and slices > self.device.node):
                raise ConfigError(
                    f"tensor_parallel={slices}: must divide the {self.devices} devices, and slices stay in one node"
                    + f" of {self.device.node}" * bool(self.device.node)
                )
        for size in self.micro_batch_sizes:
            if size < 1 or self.global_batch % size:
                raise ConfigError(f"micro_batch_size={size}: must divide the global batch of {self.global_batch}")
        for name in self.schedules:
            schedule(name)
        interval_of(self.prediction)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to run the job."""

    schedule: str
    stages: int
    replicas: int
    slices: int = 1
    """The degree of tensor parallelism."""

    micro_batch_size: int
    accumulation: int
    recompute: bool
    extra_in_flight: tuple[int, ...] = ()
    """Rounds of slack on each link; empty for none."""

    tokens_per_second: float = 0.0
    """The predicted speed of the whole job; 0 where the row is refused."""

    samples_per_second_per_device: float = 0.0
    seconds_per_micro_batch: float = 0.0
    """In the steady state."""

    stage_seconds: list[float] = field(default_factory=list)
    """What a micro-batch takes each stage to compute, forward and backward."""

    against_1f1b: float | None = None
    """The speed relative to the fastest row of 1F1B, or without a pipeline; None without such a row."""

    against_zero_bubble: float | None = None
    """The speed relative to the fastest row of a zero-bubble schedule; None without such a row."""

    memory: float = 0.0
    """Bytes of the fullest stage."""

    headroom: float = 0.0
    """Bytes that are left on all stages together."""

    drift: int = 0
    """The bound of the drift at the first stage."""

    drifted: float = 0.0
    """The share of the micro-batches, over all stages, between whose forward and backward there is an update: for PACI
    without slack (P-1)/2a."""

    layers: list[int] = field(default_factory=list)
    """How many layers each stage holds."""

    stage_parameters: list[float] = field(default_factory=list)
    """How many parameters a device of each stage holds."""

    predictions: int = 0
    """How often the first stage predicts its weights in an update.  Each prediction takes as long as an optimizer step;
    the plan counts only the part of it that replicas spend on sending."""

    refused: str = ""
    """Why the row cannot be run; empty where it can."""

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where each stage begins and the last one ends: stage s has the layers bounds[s] to bounds[s + 1] - 1."""
        return tuple(accumulate(self.layers, initial=0))

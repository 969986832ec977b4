"""How long ops and messages take, and how much that varies; in seconds, or in any other unit that all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from paci_schedule.core.ops import OpKind
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.errors import ConfigError

__all__ = ["Costs", "Noise", "check_amount"]

PerStage = float | Sequence[float]

_MOST = 1e100  # sums over a run, and squares, stay finite
_MOST_JITTER = 10


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What every op and message costs.  A list gives every stage a number of its own; a single number holds for all.

    F, B and W are those of one micro-batch through everything that a stage holds; a schedule with several chunks a
    stage spreads them evenly over the chunks.

    Raises:
        ConfigError: a cost is not a number from 0 to 1e100.
    """

    forward: PerStage
    """F: the forward."""

    backward: PerStage
    """B: the whole backward or, where `weight` is given, its first half, the gradients of inputs."""

    weight: PerStage | None = None
    """W: the second half of the backward, the gradients of weights.  Where it is not given, a schedule that splits the
    backward splits it evenly."""

    step: PerStage = 0.0
    """STEP: one optimizer update."""

    latency: PerStage = 0.0
    """The time from the end of a send to its arrival; a list has one for each link between neighbours, in order."""

    bandwidth: PerStage = math.inf
    """Bytes that a link carries in a unit of time; messages in the same direction go one after the other.  A list has
    one for each link between neighbours, in order."""

    message_bytes: float = 0.0
    """Bytes of an activation, and of a gradient, between two stages."""

    jitter: float = 0.0
    """Coefficient of variation of every F, B and W; the times are lognormal, and their mean does not change."""

    seed: int = 0
    """The seed of the random jitter."""

    sync: float | None = None
    """Time of a collective over all stages at the end of every call, once all stages are there; None for none."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, Sequence) else [value]:
                if number is None or (field.name == "bandwidth" and number == math.inf):
                    continue
                check_amount(field.name, number)
        if self.jitter > _MOST_JITTER:
            raise ConfigError(
                f"jitter={self.jitter}: must be at most {_MOST_JITTER}; it is the standard deviation of an op's time "
                "divided by its mean, such as 0.05 for 5%"
            )
        if not all(self.bandwidth if isinstance(self.bandwidth, Sequence) else [self.bandwidth]):
            raise ConfigError("bandwidth=0: must be more than 0; leave it out for links of any bandwidth")

    def durations(self, schedule: Schedule, stages: int) -> dict[OpKind, np.ndarray]:
        """For each kind of op, the time of one op of one chunk: an array of shape (stages,)."""
        forward, backward = self._spread("forward", stages), self._spread("backward", stages)
        if schedule.splits_backward:
            halved = self.weight is None
            weight = backward / 2 if halved else self._spread("weight", stages)
            backward = backward / 2 if halved else backward
        else:
            weight = np.zeros(stages)
            backward = backward if self.weight is None else backward + self._spread("weight", stages)
        return {
            OpKind.FORWARD: forward / schedule.chunks,
            OpKind.BACKWARD: backward / schedule.chunks,
            OpKind.WEIGHT: weight / schedule.chunks,
            OpKind.STEP: self._spread("step", stages),
        }

    def latencies(self, stages: int) -> np.ndarray:
        """The latency of the link after each stage, shape (stages,); from the last stage to the first the longest."""
        return self._of_links("latency", stages, max)

    def transfers(self, stages: int) -> np.ndarray:
        """How long a message occupies the link after each stage, shape (stages,); likewise."""
        return self.message_bytes / self._of_links("bandwidth", stages, min)

    def noise(self, kind: OpKind, chunk: int, stages: int) -> Noise | None:
        """The jitter of one kind of op of one chunk, or None without jitter."""
        varies = self.jitter and kind is not OpKind.STEP
        return Noise(self.jitter, [self.seed, list(OpKind).index(kind), chunk], stages) if varies else None

    def _of_links(self, name: str, stages: int, worst: Callable[..., float]) -> np.ndarray:
        value = getattr(self, name)
        if isinstance(value, Sequence):
            if len(value) != stages - 1:
                raise ConfigError(
                    f"{name}={list(value)}: {len(value)} values for the {stages - 1} links of {stages} stages; give "
                    "one for each, or a single one for all"
                )
            return np.array([*value, worst(value, default=math.inf if worst is min else 0.0)], dtype=float)
        return np.full(stages, float(value))

    def _spread(self, name: str, stages: int) -> np.ndarray:
        value = getattr(self, name)
        if isinstance(value, Sequence):
            if len(value) != stages:
                raise ConfigError(
                    f"{name}={list(value)}: {len(value)} values for {stages} stages; give one for each, or a "
                    "single one for all"
                )
            return np.array(value, dtype=float)
        return np.full(stages, float(value))


def check_amount(name: str, value: object) -> None:
    """Raises ConfigError unless `value` is a number from 0 to 1e100."""
    if not isinstance(value, int | float) or not 0 <= value <= _MOST:
        raise ConfigError(f"{name}={value!r}: must be a number from 0 to {_MOST:g}")


class Noise:
    """Lognormal factors of mean 1, one for each micro-batch and stage, the same however many are drawn at a time."""

    def __init__(self, variation: float, seed: Sequence[int], stages: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._spread = math.sqrt(math.log1p(variation**2))
        self._stages = stages

    def rows(self, count: int) -> np.ndarray:
        """The factors of the next `count` micro-batches, shape (count, stages)."""
        normal = self._generator.standard_normal((count, self._stages))
        normal *= self._spread
        normal -= self._spread**2 / 2
        return np.exp(normal, out=normal)

"""The shape of a pipeline job: how many stages, how many micro-batches an update, how far stages run ahead."""

from __future__ import annotations

from dataclasses import dataclass, fields

from paci_schedule.errors import ConfigError

__all__ = ["PipelineSpec"]


@dataclass(frozen=True, kw_only=True)
class PipelineSpec:
    """A pipeline job, validated on construction.

    Raises:
        ConfigError: a field is not a whole number in its range.
    """

    stages: int
    """P, the number of pipeline stages; at least 1."""

    accumulation: int
    """a, micro-batches per optimizer update; at least 1 (DeepSpeed: gradient_accumulation_steps)."""

    extra_in_flight: int = 0
    """k, micro-batches that the first stage runs ahead beyond 1F1B's, to hide link latency; at least 0."""

    def __post_init__(self) -> None:
        least = {"stages": 1, "accumulation": 1, "extra_in_flight": 0}
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least[field.name]:
                raise ConfigError(f"{field.name}={value!r}: must be a whole number of at least {least[field.name]}")

    def look_ahead(self, stage: int) -> int:
        """d_s, the micro-batches that `stage` runs ahead of its own backwards.

        P-1-s, as in 1F1B, plus this stage's share of `extra_in_flight`.  The round trip that latency adds grows with
        the distance to the last stage, so the share does too: ceil(k (P-1-s) / (P-1)), none at the last stage.
        """
        self.check_stage(stage)
        behind = self.stages - 1 - stage
        share = -(-self.extra_in_flight * behind // (self.stages - 1)) if behind else 0
        return behind + share

    def in_flight(self, stage: int) -> int:
        """The most micro-batches that are live at `stage` at any time: d_s + 1, which is P - s without extra."""
        return self.look_ahead(stage) + 1

    def gradients_on_wire(self, stage: int) -> int:
        """How many gradients `stage` may be sending at once: the rounds that the stage before it takes them later."""
        return self.look_ahead(stage - 1) - self.look_ahead(stage) if stage else 0

    def check_stage(self, stage: int) -> None:
        """Raises ConfigError unless `stage` is one of this pipeline's."""
        if not 0 <= stage < self.stages:
            raise ConfigError(f"stage={stage!r}: a pipeline of {self.stages} stages has stages 0 to {self.stages - 1}")

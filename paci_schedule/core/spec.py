"""The shape of a pipeline job: how many stages, how many micro-batches an update, how far stages run ahead."""

from __future__ import annotations

from dataclasses import dataclass

from paci_schedule.errors import ConfigError

__all__ = ["PipelineSpec"]


@dataclass(frozen=True, kw_only=True)
class PipelineSpec:
    """The shape of a pipeline job; a wrong value is refused on construction.

    Raises:
        ConfigError: a field is not a whole number in its range.
    """

    stages: int
    """P, the number of pipeline stages; at least 1."""

    accumulation: int
    """a, micro-batches per optimizer update; at least 1 (DeepSpeed: gradient_accumulation_steps)."""

    extra_in_flight: int | tuple[int, ...] = 0
    """Rounds of slack on the links, which hide their latency: each round lets the stages before the link run a
    micro-batch further ahead.  A tuple holds one number for each link, first to last.  A single number k means k rounds
    in all, spread as evenly as possible, where the last links get the rest.  A link with a round of slack hides a round
    trip (both ways) of up to F + B; a link without slack hides none."""

    def __post_init__(self) -> None:
        for field, least in (("stages", 1), ("accumulation", 1)):
            _check_whole(field, getattr(self, field), least)
        if not isinstance(self.extra_in_flight, tuple):
            _check_whole("extra_in_flight", self.extra_in_flight, 0)
            return
        for slack in self.extra_in_flight:
            _check_whole("extra_in_flight", slack, 0)
        if len(self.extra_in_flight) != self.stages - 1:
            raise ConfigError(
                f"extra_in_flight={self.extra_in_flight!r}: {self.stages} stages have {self.stages - 1} links; "
                "give a number for each, or one number for all together"
            )

    def look_ahead(self, stage: int) -> int:
        """d_s, the micro-batches that `stage` runs ahead of its own backwards.

        This is P-1-s, as in 1F1B, plus the slack of the links after this stage: the sum of their `extra_in_flight`, or,
        where that is one number k, ceil(k (P-1-s) / (P-1)).
        """
        self.check_stage(stage)
        behind = self.stages - 1 - stage
        if isinstance(self.extra_in_flight, tuple):
            return behind + sum(self.extra_in_flight[stage:])
        return behind + (-(-self.extra_in_flight * behind // (self.stages - 1)) if behind else 0)

    def in_flight(self, stage: int) -> int:
        """The most micro-batches that are live at `stage` at any time: d_s + 1, which is P - s without extra."""
        return self.look_ahead(stage) + 1

    def gradients_on_wire(self, stage: int) -> int:
        """How many gradients `stage` may be sending at once: it is taken so many rounds after it was made."""
        return self.look_ahead(stage - 1) - self.look_ahead(stage) if stage else 0

    def check_stage(self, stage: int) -> None:
        """Raises ConfigError unless `stage` is a stage of this pipeline."""
        if not 0 <= stage < self.stages:
            raise ConfigError(f"stage={stage!r}: a pipeline of {self.stages} stages has stages 0 to {self.stages - 1}")


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r}: must be a whole number of at least {least}")

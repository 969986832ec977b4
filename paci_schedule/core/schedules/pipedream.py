"""PipeDream: the endless 1F1B stream, an update after every backward, each backward on its forward's stashed weights.

Source: arXiv 1806.03377.  P = 3; S is the stage's step:

    stage 0   F0 F1 F2 .  .  B0 S F3 B1 S F4 B2 S ...      keeps 3 versions of its weights
    stage 1   .  F0 F1 .  B0 S F2 B1 S F3 B2 S ...         keeps 2
    stage 2   .  .  F0 B0 S F1 B1 S F2 B2 S ...            keeps 1

No bubble in the steady state, no inconsistency, but P-s weight versions and gradients up to P-1-s updates late.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from paci_schedule.core.schedules import paci
from paci_schedule.core.spec import PipelineSpec

__all__ = ["PipeDream"]


class PipeDream(paci.Paci):
    """PipeDream with weight stashing: PACI's stream with an update a micro-batch; a call takes in a whole batch."""

    name = "pipedream"
    options = frozenset()
    cannot_run = "keeps several versions of the weights; an engine keeps one"

    def run(self, spec: PipelineSpec, batches: int) -> Iterator[paci.Segment]:
        single, total = replace(spec, accumulation=1), batches * spec.accumulation
        for admitted in range(0, total, spec.accumulation):
            stop = admitted + spec.accumulation
            yield paci.Segment(single, admitted, stop, stop)
        yield paci.drain(single, total)

    def micro_batches_per_update(self, spec: PipelineSpec) -> int:
        return 1

    def drift_bound(self, spec: PipelineSpec, stage: int) -> int:
        return spec.look_ahead(stage)

    def weight_versions(self, spec: PipelineSpec, stage: int) -> int:
        return spec.in_flight(stage)

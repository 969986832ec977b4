"""PipeDream-2BW: PACI's stream with two buffered weight versions, so that F and B of a micro-batch see the same one.

Source: arXiv 2006.09503.  P = 3, a = 2; the number after the colon is the weight version that the op computes with:

    stage 0   F0:0 F1:0 F2:0 B0:0 F3:0 B1:0 S F4:1 B2:0 F5:1 B3:0 S F6:2 B4:1 ...
    stage 1   F0:0 F1:0 B0:0 F2:0 B1:0 S F3:0 B2:0 F4:1 B3:0 S F5:1 B4:1 ...
    stage 2   F0:0 B0:0 F1:0 B1:0 S F2:0 B2:0 F3:0 B3:0 S F4:1 B4:1 ...

Micro-batches of batch k use version max(0, k-1) everywhere: there is a constant delay of one update, no inconsistency
and no bubble in the steady state, and there are two versions of the weights.  Two are enough while a stage runs at most
one batch ahead, that is for a >= P-1.
"""

from __future__ import annotations

from paci_schedule.core.schedules import paci
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError

__all__ = ["PipeDream2BW"]


class PipeDream2BW(paci.Paci):
    """PipeDream-2BW, which differs from PACI in the weights that an op reads, and in what these cost in memory."""

    name = "pipedream-2bw"
    options = frozenset()
    cannot_run = "keeps several versions of the weights; an engine keeps one"

    def check(self, spec: PipelineSpec) -> None:
        super().check(spec)
        if spec.accumulation < spec.look_ahead(0):
            raise ConfigError(
                f"accumulation={spec.accumulation}: {self.name} keeps two weight versions, which takes at least "
                f"stages - 1 = {spec.look_ahead(0)} micro-batches a batch; raise them, or take paci"
            )

    def weight_versions(self, spec: PipelineSpec, stage: int) -> int:
        return 2

"""Recorded runs: the files that each rank writes, and the analysis of the files of all ranks."""

from paci_schedule.trace.analyse import between_ops, last_batches, merge, simulated, spent, timeline
from paci_schedule.trace.figures import Figures, append_figures, holds_figures, read_figures
from paci_schedule.trace.file import Recording, read, write
from paci_schedule.trace.position import Position, missing, read_all, write_position
from paci_schedule.trace.verdicts import (
    Verdict,
    ideal_seconds,
    recorded_costs,
    seconds_per_micro_batch,
    stage_seconds,
    verdicts,
)

__all__ = [
    "Figures",
    "Position",
    "Recording",
    "Verdict",
    "append_figures",
    "between_ops",
    "holds_figures",
    "ideal_seconds",
    "last_batches",
    "merge",
    "missing",
    "read",
    "read_all",
    "read_figures",
    "recorded_costs",
    "seconds_per_micro_batch",
    "simulated",
    "spent",
    "stage_seconds",
    "timeline",
    "verdicts",
    "write",
    "write_position",
]

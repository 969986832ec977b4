"""Recorded runs: the files that each rank writes, and the analysis of the files of all ranks."""

from paci_schedule.trace.analyse import last_batches, merge, simulated, spent, timeline
from paci_schedule.trace.file import Recording, read, write
from paci_schedule.trace.position import Position, missing, read_all, write_position

__all__ = [
    "Position",
    "Recording",
    "last_batches",
    "merge",
    "missing",
    "read",
    "read_all",
    "simulated",
    "spent",
    "timeline",
    "write",
    "write_position",
]

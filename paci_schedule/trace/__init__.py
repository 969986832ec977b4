"""Recorded runs: the file that each rank writes, and the analysis of the files of all ranks."""

from paci_schedule.trace.analyse import last_batches, merge, simulated, spent, timeline
from paci_schedule.trace.file import Recording, read, write

__all__ = ["Recording", "last_batches", "merge", "read", "simulated", "spent", "timeline", "write"]

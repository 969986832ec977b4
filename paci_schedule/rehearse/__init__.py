"""Rehearsals: they show in one process, on any device, what a schedule does to a model's loss.

`rehearse` runs a user's stages in the order of computation of the engines, op for op, so the weights become those that
the engines would reach on a cluster.
"""

from paci_schedule.rehearse.masters import with_masters
from paci_schedule.rehearse.run import REHEARSABLE, Update, rehearse

__all__ = ["REHEARSABLE", "Update", "rehearse", "with_masters"]

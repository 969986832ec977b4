"""Rehearsals: what a schedule does to a model's loss, found out in one process on any device, before a cluster is used.

`rehearse` runs a user's stages one after the other in the order of computation that the engines have, op for op, so the
weights are those that the engines would come to.
"""

from paci_schedule.rehearse.masters import with_masters
from paci_schedule.rehearse.run import REHEARSABLE, Update, rehearse

__all__ = ["REHEARSABLE", "Update", "rehearse", "with_masters"]

"""Several versions of a stage's weights, for schedules whose backwards read the weights of their forwards.

A version has a storage for every parameter.  To read a version, the parameters are pointed at its storages, so neither
a forward nor a backward copies anything.  A step copies the newest version first, but only if a micro-batch still reads
it; the copy goes into the storage of a version that nobody reads any more, if there is one.  So there are never more
versions than the schedule holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paci_schedule.predict.copies import write

__all__ = ["Stash"]


class Stash:
    """The versions of a stage's weights.

    Args:
        parameters: the trained parameters of the stage.
        delayed: every forward reads the version before the newest that its batch could have (PipeDream-2BW), so that
            the version before a step is always kept.

    Attributes:
        newest: the number of the newest version, which is the number of updates so far.
        most: the largest number of versions at any time.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], *, delayed: bool) -> None:
        self.newest, self.most = 0, 1
        self._parameters, self._delayed = parameters, delayed
        self._home = [parameter.data for parameter in parameters]
        self._versions = {0: self._home}
        self._spare: list[list[torch.Tensor]] = []
        self._readers: dict[int, int] = {}

    def forward(self, micro_batch: int, window: int) -> None:
        """Show the weights that the forward of a micro-batch of this window reads."""
        version = max(0, window - 1) if self._delayed else self.newest
        self._readers[micro_batch] = version
        self._show(version)

    def backward(self, micro_batch: int) -> None:
        """Show the weights that the micro-batch's forward has read."""
        self._show(self._readers.pop(micro_batch))

    def begin_step(self) -> None:
        """Show the next version, which the step will change; until then it has the values of the newest version."""
        read = {*self._readers.values(), *([self.newest] if self._delayed else [])}
        for version in [version for version in self._versions if version not in read and version != self.newest]:
            self._spare.append(self._versions.pop(version))
        if self.newest in read:
            values = self._versions[self.newest]
            fresh = self._spare.pop() if self._spare else [torch.empty_like(value) for value in values]
            write(fresh, values)
        else:
            fresh = self._versions.pop(self.newest)
        self.newest += 1
        self._versions[self.newest] = fresh
        self.most = max(self.most, len(self._versions))
        self.show_newest()

    def show_newest(self) -> None:
        """Show the weights of the last update."""
        self._show(self.newest)

    def close(self) -> None:
        """Put the newest weights where the parameters were in the beginning."""
        newest = self._versions[self.newest]
        if newest is not self._home:
            write(self._home, newest)
        self._versions = {self.newest: self._home}
        self.show_newest()

    def _show(self, version: int) -> None:
        for parameter, value in zip(self._parameters, self._versions[version], strict=True):
            parameter.data = value

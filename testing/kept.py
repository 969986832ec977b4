"""Checkpoints of jobs whose framework saves nothing by itself: a file for each rank, whole or not there.

A checkpoint counts when every rank's file is there; where all ranks look before any of them saves, they agree.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["Kept"]


class Kept:
    """The checkpoints of one job.

    Args:
        folder: for the files; it is made if need be.
        rank, ranks: this rank, and how many there are.
    """

    def __init__(self, folder: str, rank: int, ranks: int) -> None:
        self._folder, self._rank, self._ranks = Path(folder), rank, ranks
        self._folder.mkdir(exist_ok=True)

    def newest(self) -> tuple[int, Any]:
        """The number of the newest checkpoint, and this rank's part of it; 0 and None for none."""
        numbers = (int(path.stem.partition("-")[0]) for path in self._folder.glob("*-0.pt"))
        whole = [at for at in numbers if all(self._file(at, rank).exists() for rank in range(self._ranks))]
        if not whole:
            return 0, None
        return max(whole), torch.load(self._file(max(whole), self._rank), weights_only=False)

    def save(self, number: int, state: Any) -> None:
        """Save this rank's part of a checkpoint."""
        file = self._file(number, self._rank)
        torch.save(state, new := file.with_suffix(".new"))
        os.replace(new, file)

    def _file(self, number: int, rank: int) -> Path:
        return self._folder / f"{number}-{rank}.pt"

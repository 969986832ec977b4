"""Which tokens make which batch.  Batch k is a function of (seed, k) alone, so a resumed run reads on exactly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from launch.errors import LaunchError

__all__ = ["MicroBatches", "Sequences", "split_stream"]

MicroBatch = tuple[torch.Tensor, torch.Tensor]


class Sequences:
    """A row of token ids as contiguous pieces of fixed length; sequence i is followed in the text by sequence i + 1.

    Args:
        ids: token ids (n,).
        length: s, inputs (and labels) in a sequence.
    """

    def __init__(self, ids: np.ndarray, length: int) -> None:
        self._ids = ids
        self.length = length

    def __len__(self) -> int:
        return max(0, len(self._ids) - 1) // self.length

    def __getitem__(self, index: int) -> np.ndarray:
        """The s inputs and the label of the last one: token ids (s + 1,)."""
        start = index * self.length
        return self._ids[start : start + self.length + 1]


def split_stream(ids: np.ndarray, length: int, held_out: float = 0.05) -> tuple[Sequences, Sequences]:
    """Training and validation sequences: the end of the row, a share of `held_out`, is kept for validation."""
    cut = round(len(ids) * (1 - held_out))
    return Sequences(ids[:cut], length), Sequences(ids[cut:], length)


class MicroBatches:
    """The micro-batches of one data-parallel replica, from any batch on.

    Args:
        sequences: what the batches are made of.
        micro_batch_size: b, sequences in a micro-batch.
        accumulation: a, micro-batches of this replica in a batch.
        replicas: number of data-parallel replicas; each reads its own part of every batch.
        replica: which of them this is.
        seed: of the shuffle, a new one every epoch; None keeps the order of the text.

    Raises:
        LaunchError: there are fewer sequences than one batch takes.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        micro_batch_size: int,
        accumulation: int,
        replicas: int = 1,
        replica: int = 0,
        seed: int | None = None,
    ) -> None:
        self._sequences = sequences
        self._micro_batch_size = micro_batch_size
        self._accumulation = accumulation
        self._replicas = replicas
        self._replica = replica
        self._seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)
        needed = micro_batch_size * accumulation * replicas
        if len(sequences) < needed:
            raise LaunchError(
                f"{len(sequences)} sequences of {sequences.length} tokens: one batch takes {needed}; "
                "use more text, shorter sequences or a smaller batch"
            )
        self.batches_per_epoch = len(sequences) // needed
        self.sequence_length = sequences.length

    def from_batch(self, batch: int) -> Iterator[MicroBatch]:
        """Micro-batches of `batch` and of all later batches, without end: inputs (b, s) and labels (b, s), int64."""
        number = batch * self._accumulation
        while True:
            first = (number * self._replicas + self._replica) * self._micro_batch_size
            rows = [self._sequence(sample) for sample in range(first, first + self._micro_batch_size)]
            tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            number += 1

    def _sequence(self, sample: int) -> np.ndarray:
        """The `sample`-th sequence that training reads."""
        epoch, position = divmod(sample, len(self._sequences))
        if self._seed is None:
            return self._sequences[position]
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._sequences))
            self._epoch = epoch
        return self._sequences[self._order[position]]

"""Batches of the training programme: a pure function of seed and batch number, the same on every stage."""

import itertools

import numpy as np
import pytest
import torch

from launch.batches import MicroBatches, Sequences, split_stream
from launch.errors import LaunchError

LENGTH = 5


def sequences(count=13):
    return Sequences(np.arange(count * LENGTH + 1, dtype=np.uint16), LENGTH)


def batches(**changes):
    return MicroBatches(sequences(), **({"micro_batch_size": 2, "accumulation": 3, "seed": 7} | changes))


def take(source, count, batch=0):
    return list(itertools.islice(source.from_batch(batch), count))


def equal(left, right):
    assert len(left) == len(right)
    return all(torch.equal(a, b) for a, b in zip(itertools.chain(*left), itertools.chain(*right), strict=True))


def starts(micro_batches):
    """Which sequences were read, by number."""
    return [int(row[0]) // LENGTH for inputs, _ in micro_batches for row in inputs]


def test_labels_are_the_next_tokens():
    inputs, labels = take(batches(), 1)[0]
    assert inputs.shape == labels.shape == (2, LENGTH)
    assert inputs.dtype == labels.dtype == torch.int64
    assert torch.equal(labels, inputs + 1)
    assert inputs.is_contiguous()
    assert labels.is_contiguous()


def test_sequences_are_contiguous_and_share_only_the_token_between_them():
    pieces = sequences(4)
    assert len(pieces) == 4
    assert pieces[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert pieces[3].tolist() == [15, 16, 17, 18, 19, 20]
    assert len(Sequences(np.arange(4 * LENGTH), LENGTH)) == 3, "the last label is missing"


def test_a_resumed_run_reads_on_exactly():
    whole = take(batches(), 30)
    for batch in (1, 4, 7):
        assert equal(take(batches(), 30 - 3 * batch, batch), whole[3 * batch :])


def test_two_stages_see_the_same_order_whatever_each_has_read_before():
    one, other = batches(), batches()
    take(other, 17, batch=5)
    assert equal(take(one, 11, batch=2), take(other, 11, batch=2))


def test_an_epoch_reads_every_sequence_once_and_the_next_in_another_order():
    read = starts(take(batches(micro_batch_size=1), 26))
    assert sorted(read[:13]) == sorted(read[13:]) == list(range(13))
    assert read[:13] != read[13:]
    assert read[:13] != list(range(13))
    assert starts(take(batches(micro_batch_size=1, seed=8), 13)) != read[:13]


def test_without_a_seed_the_order_is_the_text():
    assert starts(take(batches(micro_batch_size=1, seed=None), 15)) == [*range(13), 0, 1]


def test_replicas_share_a_batch_without_overlap():
    alone = batches(micro_batch_size=6, accumulation=2)
    parts = [batches(micro_batch_size=2, accumulation=2, replicas=3, replica=replica) for replica in range(3)]
    for batch in (0, 3):
        together = zip(*(take(part, 2, batch) for part in parts), strict=True)
        for (inputs, _), split in zip(take(alone, 2, batch), together, strict=True):
            assert torch.equal(torch.cat([piece for piece, _ in split]), inputs)


def test_the_end_of_the_text_is_held_out():
    training, held_out = split_stream(np.arange(2001), length=10)
    assert len(training) == 190
    assert len(held_out) == 9
    assert training[189].max() < held_out[0].min()


def test_too_little_text_for_one_batch_is_refused():
    with pytest.raises(LaunchError, match="13 sequences of 5 tokens: one batch takes 14"):
        batches(micro_batch_size=7, accumulation=2)
    assert batches(micro_batch_size=2, accumulation=3).batches_per_epoch == 2

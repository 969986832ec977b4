"""Data that public training programs read, made up."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

__all__ = ["token_documents"]


def token_documents(prefix: Path, words: int, documents: int = 200, length: int = 40) -> None:
    """Write PREFIX.bin and PREFIX.idx, in the format of Megatron's memory-mapped data sets, version 1.

    Each document counts in threes from a random word, so that the next word can be learned.

    Args:
        prefix: path without its ending.
        words: size of the vocabulary, at most 65,536.
        documents: how many there are.
        length: tokens in each.
    """
    first = np.random.default_rng(0).integers(words, size=(documents, 1))
    tokens = ((first + 3 * np.arange(length)) % words).astype(np.uint16)
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    with prefix.with_suffix(".idx").open("wb") as index:
        index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, documents, documents + 1))  # 8 stands for uint16
        index.write(np.full(documents, length, dtype=np.int32).tobytes())
        index.write((np.arange(documents, dtype=np.int64) * length * tokens.itemsize).tobytes())
        index.write(np.arange(documents + 1, dtype=np.int64).tobytes())

"""Text to token ids: bytes as they are, or a byte-pair encoding trained on the corpus itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from launch.errors import LaunchError

__all__ = ["BytePairTokenizer", "ByteTokenizer", "TextTokenizer"]

_END = "<|endoftext|>"
_TRAINING_CHARACTERS = 50_000_000


class TextTokenizer(Protocol):
    """Turns documents into token ids."""

    vocabulary: int
    """Number of distinct ids."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of every document, each closed by the end-of-document id."""


class ByteTokenizer:
    """UTF-8 bytes are ids 0 to 255; 256 ends a document."""

    vocabulary = 257

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.append(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16), 256) for text in texts]


class BytePairTokenizer:
    """A byte-level BPE, as GPT-2 uses, kept in one `tokenizer.json` that `tokenizers` and `transformers` read."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))
        self._end = self._tokenizer.token_to_id(_END)
        if self._end is None:
            raise LaunchError(f"tokenizer {str(path)!r}: has no token {_END} to end a document with; add it")
        self.vocabulary = self._tokenizer.get_vocab_size()

    @staticmethod
    def train(path: Path, texts: Iterable[str], vocabulary: int) -> None:
        """Train on the first 50 million characters of `texts` and write `path`."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[_END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_first(texts, _TRAINING_CHARACTERS), trainer)
        tokenizer.save(str(path))

    @staticmethod
    def fetch(path: Path, name: str) -> None:
        """Download the tokenizer of the hub's model `name`, for example openai-community/gpt2, and write `path`."""
        Tokenizer.from_pretrained(name).save(str(path))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.append(encoding.ids, self._end) for encoding in self._tokenizer.encode_batch(texts)]


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return

"""The tokens of a text file as training and validation data; the last tenth of the text is for validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from paci_schedule.core.files import read_text
from paci_schedule.errors import ConfigError, UnsupportedError

__all__ = ["Text"]

_VALIDATION_SEED = 5
_LARGEST = 1 << 28  # bytes of a text
_LEAST = 257  # tokens of a byte-pair encoding


class Text:
    """A text, from which windows of `context` tokens and the tokens that follow them are drawn.

    Args:
        path: a text file in UTF-8.
        context: the number of tokens in a window.
        device: the device that the windows are on.
        vocabulary: 0 for one token for each character, or else the size of a byte-pair encoding, at least 257; the
            encoding is trained on the part that is not for validation.

    Raises:
        ConfigError: the file cannot be read, its last tenth is too short for a window, or the vocabulary is too small.
        UnsupportedError: the package that trains a byte-pair encoding is not installed.

    Attributes:
        vocabulary: the number of different tokens.
    """

    def __init__(self, path: Path, context: int, device: torch.device, vocabulary: int = 0) -> None:
        try:
            text = read_text(path, _LARGEST)
        except (OSError, ValueError) as error:
            raise ConfigError(f"text={str(path)!r}: cannot be read ({error}); give a text file in UTF-8") from None
        end = len(text) * 9 // 10
        encode, self.vocabulary = _bytes_pairs(text[:end], vocabulary) if vocabulary else _characters(text)
        training, validation = (torch.tensor(encode(part), dtype=torch.int64) for part in (text[:end], text[end:]))
        if min(len(training), len(validation)) < context + 2:
            raise ConfigError(
                f"text={str(path)!r} has {len(training) + len(validation)} tokens: its last tenth, for validation, "
                f"must be longer than a context of {context}; give a longer text, or a shorter context"
            )
        self._context = context
        self._training, self._validation = training.to(device), validation.to(device)

    def micro_batch(self, seed: int, index: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels, int64[size, context] each, the same for the same seed and index."""
        return self._windows(self._training, 1_000_003 * seed + index, size)

    def validation(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels of the last tenth, int64[size, context] each, always the same."""
        return self._windows(self._validation, _VALIDATION_SEED, size)

    def _windows(self, ids: torch.Tensor, seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(ids) - self._context - 1, (size, 1), generator=generator)
        places = (starts + torch.arange(self._context)).to(ids.device, non_blocking=True)
        return ids[places], ids[places + 1]


_Encode = Callable[[str], list[int]]


def _characters(text: str) -> tuple[_Encode, int]:
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    return lambda part: [ids[character] for character in part], len(ids)


def _bytes_pairs(text: str, vocabulary: int) -> tuple[_Encode, int]:
    if vocabulary < _LEAST:
        raise ConfigError(
            f"vocabulary={vocabulary}: must be at least {_LEAST} (256 bytes and one pair), or 0 for characters"
        )
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError:
        raise UnsupportedError("a byte-pair encoding needs the package tokenizers; pip install tokenizers") from None
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text.splitlines(keepends=True), vocabulary, show_progress=False)
    return lambda part: tokenizer.encode(part).ids, tokenizer.get_vocab_size()

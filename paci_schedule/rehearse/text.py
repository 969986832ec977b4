"""Characters of a text file as training and validation data; the last tenth is for validation."""

from __future__ import annotations

from pathlib import Path

import torch

from paci_schedule.errors import ConfigError

__all__ = ["Text"]

_VALIDATION_SEED = 5


class Text:
    """A text, cut into windows of `context` characters and the characters after them.

    Args:
        path: a file in UTF-8.
        context: characters of a window.
        device: where the windows shall be.

    Raises:
        ConfigError: it cannot be read, or its last tenth is too short for a window.

    Attributes:
        vocabulary: how many different characters there are.
    """

    def __init__(self, path: Path, context: int, device: torch.device) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"text={str(path)!r}: cannot be read ({error}); give a text file in UTF-8") from None
        characters = {character: number for number, character in enumerate(sorted(set(text)))}
        ids = torch.tensor([characters[character] for character in text], dtype=torch.int64)
        start = len(ids) * 9 // 10
        if len(ids) - start < context + 2:
            raise ConfigError(
                f"text={str(path)!r} has {len(ids)} characters: its last tenth, for validation, must be longer than a "
                f"context of {context}; give a longer text, or a shorter context"
            )
        self.vocabulary = len(characters)
        self._context = context
        self._training, self._validation = ids[:start].to(device), ids[start:].to(device)

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

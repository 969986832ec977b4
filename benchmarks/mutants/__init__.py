"""Wrong code on purpose, to see which test notices."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

__all__ = ["ROOT", "Mutant", "mutated"]

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    """One wrong piece of code.

    Attributes:
        rule: what it breaks.
        does: how the code behaves then.
        file: from the root of the repository.
        right: text that stands in the file exactly once.
        wrong: its replacement.
        tests: what pytest is asked to run.
    """

    rule: str
    does: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """The text of the mutant's file with the wrong piece in it.

    Raises:
        ValueError: the right piece does not stand in the file exactly once.
    """
    text = (root / mutant.file).read_text(encoding="utf-8")
    count = text.count(mutant.right)
    if count != 1:
        raise ValueError(
            f"{mutant.file} has this text {count} times, not once; benchmarks/mutants/listed.py has to say what "
            f"stands there now:\n{mutant.right}"
        )
    return text.replace(mutant.right, mutant.wrong)

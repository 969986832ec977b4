"""A corpus as one long row of token ids, made once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from launch.corpus import Corpus
from launch.errors import LaunchError
from launch.tokenizer import BytePairTokenizer, ByteTokenizer, TextTokenizer

__all__ = ["TokenStream", "tokenise"]

_FORMAT = 1


@dataclass(frozen=True)
class TokenStream:
    """Every document of a corpus, one after the other, each closed by the end-of-document id."""

    ids: np.ndarray
    """Token ids (n,), mapped from disk."""

    vocabulary: int
    """Number of distinct ids."""


def tokenise(corpus: Corpus, cache: Path, *, tokenizer: str = "byte", vocabulary: int = 8192) -> TokenStream:
    """The tokens of `corpus`.  The first process to ask makes them; the others, and later runs, find them in `cache`.

    Args:
        corpus: the documents.
        cache: folder of the made token streams; all processes of a machine must see the same one.
        tokenizer: "byte"; "bpe", trained on the corpus; "hub:NAME", of a model of the Hugging Face hub; or the path of
            a `tokenizer.json`.
        vocabulary: size of a trained BPE.

    Raises:
        LaunchError: `tokenizer` is none of these, or the corpus holds no text.
    """
    made_with = tokenizer
    if tokenizer == "bpe":
        made_with = f"bpe {vocabulary}"
    elif Path(tokenizer).is_file():
        made_with = hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
    elif tokenizer != "byte" and not tokenizer.startswith("hub:"):
        raise LaunchError(f"tokenizer {tokenizer!r}: must be 'byte', 'bpe', 'hub:NAME' or the path of a tokenizer.json")
    key = hashlib.sha256(f"{_FORMAT}\n{made_with}\n{corpus.identity}".encode()).hexdigest()[:16]
    folder = cache / key
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{key}.lock"):
        if not folder.exists():
            _make(corpus, folder, tokenizer, vocabulary)
    facts = json.loads((folder / "facts.json").read_text())
    return TokenStream(np.memmap(folder / "ids.bin", dtype=facts["dtype"], mode="r"), facts["vocabulary"])


def _make(corpus: Corpus, folder: Path, tokenizer: str, vocabulary: int) -> None:
    """Fill a temporary folder and rename it, so that `folder` is whole or absent."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    documents = corpus.load()
    encoder: TextTokenizer
    if tokenizer == "byte":
        encoder = ByteTokenizer()
    else:
        kept = partial / "tokenizer.json"
        if tokenizer == "bpe":
            BytePairTokenizer.train(kept, (row["text"] for row in documents), vocabulary)
        elif tokenizer.startswith("hub:"):
            BytePairTokenizer.fetch(kept, tokenizer.removeprefix("hub:"))
        else:
            shutil.copy(tokenizer, kept)
        encoder = BytePairTokenizer(kept)
    dtype = np.dtype(np.uint16 if encoder.vocabulary <= 2**16 else np.uint32)
    count = 0
    with (partial / "ids.bin").open("wb") as file:
        for batch in documents.iter(batch_size=256):
            for ids in encoder.encode(batch["text"]):
                file.write(ids.astype(dtype).tobytes())
                count += len(ids)
    if not count:
        raise LaunchError(f"data {corpus.name!r}: holds no text")
    facts = {"corpus": corpus.name, "tokens": count, "vocabulary": encoder.vocabulary, "dtype": dtype.name}
    (partial / "facts.json").write_text(json.dumps(facts))
    partial.rename(folder)

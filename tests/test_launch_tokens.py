"""Corpora and the token cache: read once, found again, made anew when the text or the tokenizer changes."""

import dataclasses

import datasets
import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer

from launch.corpus import Corpus, open_corpus
from launch.errors import LaunchError
from launch.tokenizer import ByteTokenizer
from launch.tokens import tokenise

TEXTS = ["def f(x):\n    return x\n", "naïve café ☕ " * 40, ""]


@pytest.fixture(autouse=True)
def no_traces_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


class Reads:
    """A corpus in memory that counts how often it is read."""

    def __init__(self, texts=TEXTS):
        self.count = 0
        self.corpus = Corpus(name="test", identity=repr(texts), load=lambda: self.read(texts))

    def read(self, texts):
        self.count += 1
        return Dataset.from_dict({"text": texts})


def test_bytes_come_back_and_257_ids_are_enough(tmp_path):
    stream = tokenise(Reads().corpus, tmp_path)
    ends = np.flatnonzero(stream.ids == 256)
    documents = np.split(stream.ids, ends + 1)[:-1]
    assert [bytes(document[:-1].astype(np.uint8)).decode() for document in documents] == TEXTS
    assert stream.vocabulary == ByteTokenizer.vocabulary == 257
    assert stream.ids.dtype == np.uint16


def test_text_is_tokenised_once(tmp_path):
    reads = Reads()
    first = tokenise(reads.corpus, tmp_path)
    second = tokenise(reads.corpus, tmp_path)
    assert reads.count == 1
    assert np.array_equal(first.ids, second.ids)


def test_another_text_or_tokenizer_is_tokenised_anew(tmp_path):
    reads = Reads()
    tokenise(reads.corpus, tmp_path)
    tokenise(reads.corpus, tmp_path, tokenizer="bpe", vocabulary=300)
    tokenise(reads.corpus, tmp_path, tokenizer="bpe", vocabulary=310)
    tokenise(dataclasses.replace(reads.corpus, identity="changed"), tmp_path)
    assert reads.count == 4


def test_what_a_failed_attempt_left_behind_is_not_taken_for_tokens(tmp_path):
    def fail():
        raise OSError("cut off")

    reads = Reads()
    with pytest.raises(OSError, match="cut off"):
        tokenise(dataclasses.replace(reads.corpus, load=fail), tmp_path)
    assert len(tokenise(reads.corpus, tmp_path).ids) > 0
    assert reads.count == 1


def test_a_trained_bpe_is_shorter_and_says_the_same(tmp_path):
    stream = tokenise(Reads().corpus, tmp_path, tokenizer="bpe", vocabulary=280)
    assert len(stream.ids) < len(tokenise(Reads().corpus, tmp_path).ids)
    assert stream.vocabulary <= 280
    [kept] = tmp_path.glob("*/tokenizer.json")
    assert Tokenizer.from_file(str(kept)).decode(stream.ids.tolist()) == "".join(TEXTS)
    again = tokenise(Reads().corpus, tmp_path / "other", tokenizer=str(kept))
    assert np.array_equal(again.ids, stream.ids)


def test_bad_names_are_refused_with_the_choices(tmp_path):
    with pytest.raises(LaunchError, match="tokenizer 'bytes': must be 'byte', 'bpe'"):
        tokenise(Reads().corpus, tmp_path, tokenizer="bytes")
    with pytest.raises(LaunchError, match=r"data 'nowhere/\*.txt': no such file"):
        open_corpus("nowhere/*.txt")
    with pytest.raises(LaunchError, match="holds no text"):
        tokenise(Reads([]).corpus, tmp_path)


def test_files_are_documents_and_a_changed_file_is_another_corpus(tmp_path):
    for name, text in {"a.txt": "one\n\ntwo", "b.txt": "three", "deep/c.txt": "four"}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    corpus = open_corpus(str(tmp_path / "**" / "*.txt"))
    assert sorted(corpus.load()["text"]) == ["four", "one\n\ntwo", "three"]
    assert open_corpus(str(tmp_path / "**" / "*.txt")).identity == corpus.identity
    (tmp_path / "b.txt").write_text("three and a half")
    assert open_corpus(str(tmp_path / "**" / "*.txt")).identity != corpus.identity


def test_a_hub_dataset_gives_its_text_column(tmp_path):
    """A folder of data files stands for a dataset of the hub: `load_dataset` takes both."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a", "story": "one"}\n{"text": "b", "story": "two"}\n')
    assert open_corpus(f"hub:{folder}").load()["text"] == ["a", "b"]
    assert open_corpus(f"hub:{folder}", column="story").load()["text"] == ["one", "two"]
    with pytest.raises(LaunchError, match="no column 'body' among text, story"):
        open_corpus(f"hub:{folder}", column="body").load()
    with pytest.raises(LaunchError, match="no such dataset, configuration or split"):
        open_corpus(f"hub:{folder}", split="test").load()


def test_the_default_is_this_pythons_standard_library():
    corpus = open_corpus()
    assert corpus.name.endswith("standard library")
    assert "/json/decoder.py" in corpus.identity
    assert "site-packages" not in corpus.identity
    assert "/test/" not in corpus.identity

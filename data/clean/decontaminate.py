"""Evaluation sets kept out of the training text: what shares a run of words with them is cut out, or falls whole.

As GPT-3 (Brown et al. 2020, §C): 13-grams of words, without case and punctuation; a match goes with 200 characters on either side,
pieces of fewer than 200 characters go, and a document in more than 10 pieces falls. DeepSeekMath's rule (§2.1) is
`ngram: 10, min_ngram: 3, action: reject`.

The index is a sorted array of 64-bit hashes, 8 bytes an n-gram, built once in every process. A run of other words is taken for a
match once in 2⁶⁴/(n-grams indexed): for ten million of them, once in 2·10¹² words.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from glob import glob
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data.clean.step import Step, StepRecord
from data.compressed import DAMAGE, damaged, opened
from data.documents import Document, Rejected
from data.errors import DataError

# Letters and digits with their accents; Chinese characters and kana, which no space parts, one by one.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_LETTERS = rf"[^\W_{_ALONE}]"
WORD = re.compile(rf"[{_ALONE}]|{_LETTERS}+(?:[\u0300-\u036f]+{_LETTERS}*)*")
WORD_LENGTH = 100  # characters that tell a word from others
RADIX = 0x9E3779B97F4A7C15  # odd, so that multiplying loses nothing mod 2⁶⁴


class Decontaminate(StepRecord):
    """Where the evaluation sets are, and what happens to a document that shares words with them."""

    kind: Literal["decontaminate"] = "decontaminate"
    # Files and patterns. .jsonl, .json, .parquet: every string in them is an item; text: what empty lines part.
    evaluation: list[str] = Field(min_length=1)
    ngram: int = Field(default=13, ge=1)  # words
    min_ngram: int = Field(default=8, ge=1)  # an item shorter than `ngram` is matched whole, down to this many words
    action: Literal["cut", "reject"] = "cut"
    margin: int = Field(default=200, ge=0)  # characters that go with a match, on either side
    min_piece: int = Field(default=200, ge=0)  # characters; shorter pieces of a document that was cut go
    max_pieces: int = Field(default=10, ge=1)  # a document cut into more falls

    @model_validator(mode="after")
    def _lengths_fit(self) -> "Decontaminate":
        if self.min_ngram > self.ngram:
            raise ValueError(f"min_ngram: {self.min_ngram}: is more than ngram = {self.ngram}; lower it")
        return self

    def build(self) -> Step:
        """Read the evaluation sets.

        Raises:
            DataError: a file cannot be read, or has no item of `min_ngram` words.
        """
        return _Decontaminate(self, _index(self))

    def files(self) -> list[Path]:
        """The evaluation sets."""
        return list(_files(self.evaluation))


Index = dict[int, NDArray[np.uint64]]  # n → sorted hashes of the n-grams of that length


class _Decontaminate:
    def __init__(self, settings: Decontaminate, index: Index) -> None:
        self._settings = settings
        self._index = index

    def apply(self, document: Document) -> Document | Rejected:
        """The document, without what it shares with an evaluation set, or "contaminated"."""
        matches = self._matches(document.text)
        if not matches:
            return document
        if self._settings.action == "reject":
            return Rejected("contaminated")
        pieces = [piece for piece in _pieces(document.text, matches, self._settings.margin) if piece]
        if len(pieces) > self._settings.max_pieces:
            return Rejected("contaminated")
        remains = "\n\n".join(piece for piece in pieces if len(piece) >= self._settings.min_piece)
        return replace(document, text=remains) if remains else Rejected("contaminated")

    def _matches(self, text: str) -> list[tuple[int, int]]:
        """(first word, last word + 1) of each n-gram of the text that an evaluation set has."""
        words = _word_hashes(text)
        found = []
        for n, known in self._index.items():
            ngrams = _ngram_hashes(words, n)
            order = np.argsort(ngrams)  # sorted, they are looked up in half the time
            place = np.searchsorted(known, ngrams[order])
            hits = order[known[np.minimum(place, len(known) - 1)] == ngrams[order]]
            found += [(first, first + n) for first in hits.tolist()]
        return found


def _pieces(text: str, matches: list[tuple[int, int]], margin: int) -> Iterator[str]:
    """What is left of a text between its matches, each widened by `margin` characters and then to whole words."""
    spans = [match.span() for match in WORD.finditer(text)]
    starts, ends = (np.array(column) for column in zip(*spans, strict=True))
    cuts = sorted((int(starts[first]) - margin, int(ends[last - 1]) + margin) for first, last in matches)
    merged = [cuts[0]]
    for start, end in cuts[1:]:
        if start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    begin = 0
    for start, end in merged:
        before = np.searchsorted(ends, start, "right")  # words that end ahead of the cut
        yield text[begin : int(ends[before - 1]) if before else 0].strip()
        after = np.searchsorted(starts, end)  # the first word that starts behind it
        begin = int(starts[after]) if after < len(starts) else len(text)
    yield text[begin:].strip()


def _index(settings: Decontaminate) -> Index:
    """The n-grams of all evaluation sets."""
    hashes: dict[int, list[NDArray[np.uint64]]] = defaultdict(list)
    for path in _files(settings.evaluation):
        usable = 0
        for item in _items(path):
            words = _word_hashes(item)
            if len(words) >= settings.min_ngram:
                n = min(len(words), settings.ngram)
                hashes[n].append(_ngram_hashes(words, n))
                usable += 1
        if not usable:
            raise DataError(
                f"steps: decontaminate: evaluation: {path}: has no text of {settings.min_ngram} words (min_ngram); "
                "lower min_ngram, or leave the file out"
            )
    return {n: np.unique(np.concatenate(hashes[n])) for n in sorted(hashes)}


def _files(patterns: list[str]) -> list[Path]:
    files: list[Path] = []
    for pattern in patterns:
        matching = sorted(path for match in glob(pattern, recursive=True) if (path := Path(match)).is_file())
        if not matching:
            raise DataError(
                f"steps: decontaminate: evaluation: {pattern!r}: no such file or pattern; mend it (relative to {Path.cwd()})"
            )
        files += matching
    return files


def _items(path: Path) -> Iterator[str]:
    """The texts of an evaluation set."""
    if path.suffix == ".parquet":
        try:
            yield from _strings(pyarrow.parquet.read_table(path).to_pylist())
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path}: no Parquet ({str(error).splitlines()[0]}); fetch the file again") from None
        return
    number = 0
    with opened(path) as file:
        try:
            if not {".json", ".jsonl"} & set(path.suffixes):
                yield from re.split(r"\n[ \t\r]*\n", file.read().decode())
                return
            if ".json" in path.suffixes:
                yield from _strings(json.loads(file.read()))
                return
            for line in file:
                number += 1
                if line.strip():
                    yield from _strings(json.loads(line))
        except UnicodeDecodeError as error:
            raise DataError(f"{_place(path, number)}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{_place(path, number)}: no JSON ({error.msg}); mend the file, or fetch it again"
            ) from None
        except DAMAGE as error:
            raise damaged(path, f"line {number}", error) from None


def _place(path: Path, line: int) -> str:
    return f"{path}: line {line}" if line else str(path)


def _strings(value: Any) -> Iterator[str]:
    """Every string inside a JSON value; keys of objects are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _word_hashes(text: str) -> NDArray[np.uint64]:
    """[W] a hash of each word."""
    return np.array([_word_hash(word) for word in WORD.findall(text)], np.uint64)


@lru_cache(1 << 16)
def _word_hash(word: str) -> int:
    """64 bits of a word, without its case, its accents in one form."""
    plain = unicodedata.normalize("NFKC", word[:WORD_LENGTH]).casefold()
    return int.from_bytes(blake2b(plain.encode(), digest_size=8).digest(), "little")


def _ngram_hashes(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """[W − n + 1] Σ_j words[i + j]·RADIX^(n−1−j) mod 2⁶⁴; empty where there are fewer than n words."""
    count = max(0, len(words) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for j in range(n):
        hashes = hashes * np.uint64(RADIX) + words[j : j + count]
    return hashes

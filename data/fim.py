"""What happens to a document between its text and its tokens, by DeepSeek-V3 §4.1.

Fill-in-the-middle: a share `fim_rate` of the documents is cut at two places and written prefix, suffix, middle,

    <｜fim▁begin｜> prefix <｜fim▁hole｜> suffix <｜fim▁end｜> middle <｜end▁of▁sentence｜>

so that a model learns to fill a hole from both its sides. The two cuts are uniform over the characters of the text (Bavarian et
al., arXiv:2207.14255, §3), and each part is tokenized by itself.

Split tokens: the pre-tokenizer joins punctuation with the line breaks after it. A prompt that ends between the two shows a model
what it has never been trained on (token boundary bias). So a share `split_joined_rate` of these tokens is written as the
tokens of their two halves. DeepSeek-V3 does not say what share.

Every draw is a function of the seed, the hash of the document's text and a position: tokens do not depend on which documents
are encoded together, nor on their order.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data.errors import DataError
from data.hashing import scramble
from data.indexed import Tokens, token_dtype
from data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, eos_token_id, load_tokenizer, vocab_size
from data.tokenizer.words import Words

# Text that the tokenizers library is given at a time: it takes about 130 bytes of memory for each byte of text.
MOST_CHARACTERS = 1 << 18
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the step of SplitMix64 (Steele, Lea and Flood, 2014)
LINE_START = re.compile(r".*\n(?=[^\W_])", re.DOTALL)  # matches up to the last one
WORD_START = re.compile(r".*[^\W\d_](?= [^\W\d_])", re.DOTALL)


class Encoder:
    """A tokenizer folder with the two transformations: texts in, token ids of whole documents out.

    Args:
        folder: a Hugging Face tokenizer folder.
        fim_rate: share of the documents in fill-in-the-middle form.
        split_joined_rate: share of the tokens of punctuation and line breaks that are split.
        seed: of both.

    Raises:
        DataError: `fim_rate` is above 0 and the tokenizer has no tokens for it.
    """

    def __init__(self, folder: Path, fim_rate: float = 0.0, split_joined_rate: float = 0.0, seed: int = 0) -> None:
        self.dtype = token_dtype(vocab_size(folder))
        self._tokenizer = load_tokenizer(folder)
        self._words = Words.of(folder)
        self._end = eos_token_id(folder)
        self._marks = _fim_marks(folder, self._tokenizer, fim_rate) if fim_rate else ()
        self._joined = JoinedTokens.of(folder) if split_joined_rate else None
        self._fim_rate, self._split_rate, self._seed = fim_rate, split_joined_rate, seed

    def encode(self, texts: Sequence[str], hashes: Sequence[bytes], plain: Sequence[bool]) -> list[Tokens]:
        """Token ids [length] of each document, its end-of-sentence token included.

        Args:
            texts: the documents.
            hashes: of their texts, as `data.documents.text_hash` gives them; they decide what is drawn.
            plain: the documents that are left as they are, such as those of validation.
        """
        runs: list[_Run] = []
        first = [0]  # run of each document, and the number of runs
        for text, digest, left in zip(texts, hashes, plain):
            runs += self._runs(text, digest, left)
            first.append(len(runs))
        tokens = [ids for batch in _batches(runs) for ids in self._encode_runs(batch)]
        return [
            tokens[start] if stop == start + 1 else np.concatenate(tokens[start:stop])
            for start, stop in pairwise(first)
        ]

    def _runs(self, text: str, digest: bytes, left: bool) -> Iterator["_Run"]:
        """A document as runs: its parts in the order in which they are written, long ones in slices."""
        cuts = None if left or not self._fim_rate else fim_cuts(text, digest, self._fim_rate, self._seed)
        if cuts is None:
            parts: Sequence[str] = (text,)
        else:
            parts = (text[: cuts[0]], text[cuts[1] :], text[cuts[0] : cuts[1]])
        marks = () if cuts is None else self._marks
        for number, part in enumerate(parts):
            for start, stop in _slices(part):
                yield _Run(
                    part[start:stop],
                    marks[number : number + 1] if start == 0 else (),
                    (self._end,) if stop == len(part) and number == len(parts) - 1 else (),
                    0 if self._joined is None else _draws("split", self._seed, digest, number, start)[0],
                    0.0 if left else self._split_rate,
                )

    def _encode_runs(self, runs: Sequence["_Run"]) -> list[Tokens]:
        """Token ids [length] of each run."""
        if self._words is None:
            encodings = self._tokenizer.encode_batch_fast([run.text for run in runs], add_special_tokens=False)
            ids = [encoding.ids for encoding in encodings]
        else:
            ids = [self._words.encode(run.text) for run in runs]
        for tokens_of_run, run in zip(ids, runs):
            tokens_of_run[:0] = run.before
            tokens_of_run += run.after
        counts = np.array([len(each) for each in ids])
        tokens = np.fromiter(chain.from_iterable(ids), self.dtype, int(counts.sum()))
        if self._joined is not None:
            keys, rates = np.array([run.key for run in runs], np.uint64), np.array([run.split_rate for run in runs])
            tokens, counts = self._joined.split(tokens, counts, keys, rates)
        return np.split(tokens, np.cumsum(counts)[:-1])


class _Run(NamedTuple):
    """A stretch of a document that is tokenized by itself."""

    text: str
    before: Sequence[int]  # special tokens in front of it
    after: Sequence[int]
    key: int  # decides which of its joined tokens are split
    split_rate: float


def fim_cuts(text: str, digest: bytes, rate: float, seed: int) -> tuple[int, int] | None:
    """Where the middle of a document begins and ends, in characters; None for a document that stays as it is.

    Args:
        digest: hash of the text.
        rate: share of the documents that are cut.
    """
    chosen, one, other = _draws("fim", seed, digest)
    if chosen >= rate * 2**64:
        return None
    first, last = sorted(number * (len(text) + 1) >> 64 for number in (one, other))
    return first, last


@dataclass(frozen=True)
class JoinedTokens:
    """The tokens of a vocabulary that are punctuation and the line breaks after it, and what each is split into."""

    halves: dict[int, list[int]]  # of a token: the ids of its punctuation, then those of its line breaks
    lengths: npt.NDArray[np.int64]  # [V] number of these ids; 1 for every other token

    @classmethod
    def of(cls, folder: Path) -> "JoinedTokens":
        """Those of a tokenizer folder."""
        return _joined_tokens(folder, (folder / "tokenizer.json").stat().st_mtime_ns)

    def split(
        self,
        tokens: Tokens,
        counts: npt.NDArray[np.int64],
        keys: npt.NDArray[np.uint64],
        rates: npt.NDArray[np.float64],
    ) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Split some of these tokens in runs that follow one another.

        Args:
            tokens: [tokens] of all runs.
            counts: [runs] tokens of each.
            keys: [runs] what decides, together with the position in the run, which tokens are split.
            rates: [runs] share of the tokens that are.

        Returns:
            tokens and counts after it.
        """
        found = np.flatnonzero(self.lengths[tokens] > 1)
        ends = np.cumsum(counts)
        run = ends.searchsorted(found, side="right")
        place = (found - (ends - counts)[run]).astype(np.uint64)
        chosen = scramble(keys[run] + (place + np.uint64(1)) * GOLDEN)
        kept = (chosen >> np.uint64(11)) * 2.0**-53 < rates[run]
        found, run = found[kept], run[kept]
        numbers = tokens[found]
        added = self.lengths[numbers] - 1
        longer = np.ones(len(tokens), np.int64)
        longer[found] += added
        result = np.repeat(tokens, longer)
        starts = found + np.cumsum(added) - added  # where the halves go
        for start, number in zip(starts.tolist(), numbers.tolist()):
            result[start : start + len(self.halves[number])] = self.halves[number]
        return result, counts + np.bincount(run, added, len(counts)).astype(np.int64)


@lru_cache(maxsize=4)
def _joined_tokens(folder: Path, modified: int) -> JoinedTokens:
    """`JoinedTokens.of`, once for each state of the file."""
    tokenizer, size = load_tokenizer(folder), vocab_size(folder)
    halves: dict[int, list[int]] = {}
    for number, text in enumerate(tokenizer.decode_batch([[number] for number in range(size)])):
        punctuation = text.rstrip("\r\n")
        if len(punctuation) in (0, len(text)) or not _is_punctuation(punctuation):
            continue
        ids = [
            half_id
            for half in (punctuation, text[len(punctuation) :])
            for half_id in tokenizer.encode(half, add_special_tokens=False).ids
        ]
        if tokenizer.decode([number, *ids]) == tokenizer.decode([number, number]):
            halves[number] = ids
    lengths = np.ones(size, np.int64)
    lengths[list(halves)] = [len(ids) for ids in halves.values()]
    return JoinedTokens(halves, lengths)


def _draws(purpose: str, seed: int, digest: bytes, *place: int) -> list[int]:
    """Three numbers below 2^64 that hang on the purpose, the seed, a document's hash and a place in it."""
    drawn = blake2b(repr((purpose, seed, *place)).encode() + digest, digest_size=24).digest()
    return [int.from_bytes(drawn[start : start + 8], "little") for start in (0, 8, 16)]


def _is_punctuation(text: str) -> bool:
    """Punctuation and symbols, with a space before them or without; U+FFFD stands for a part of a character."""
    return all(unicodedata.category(character)[0] in "PS" for character in text.removeprefix(" ")) and not (
        text in ("", " ") or "\ufffd" in text
    )


def _fim_marks(folder: Path, tokenizer: Tokenizer, rate: float) -> tuple[int, ...]:
    """Ids of what stands before prefix, suffix and middle."""
    marks = (FIM_BEGIN, FIM_HOLE, FIM_END)
    ids = {mark: number for mark in marks if (number := tokenizer.token_to_id(mark)) is not None}
    if missing := [mark for mark in marks if mark not in ids]:
        raise DataError(
            f"fim_rate = {rate}: the tokenizer {folder} has no token {missing[0]}; "
            "set fim_rate: 0, or take a tokenizer with the three tokens of fill-in-the-middle"
        )
    return tuple(ids.values())


def _batches(runs: Sequence[_Run]) -> Iterator[Sequence[_Run]]:
    """Groups of runs of about MOST_CHARACTERS."""
    start = size = 0
    for stop, run in enumerate(runs, 1):
        size += len(run.text)
        if size >= MOST_CHARACTERS or stop == len(runs):
            yield runs[start:stop]
            start, size = stop, 0


def _slices(text: str) -> Iterator[tuple[int, int]]:
    """Ranges of a text of at most MOST_CHARACTERS, where it can be cut without a change to its tokens.

    Such a place is between a line break and a letter or digit; failing that, in front of the space before a word. The second
    half of the range is looked through. Text without either is cut where the range ends.
    """
    start = 0
    while len(text) - start > MOST_CHARACTERS:
        window = (start + MOST_CHARACTERS // 2, start + MOST_CHARACTERS)
        found = LINE_START.match(text, *window) or WORD_START.match(text, *window)
        stop = found.end() if found else window[1]
        yield start, stop
        start = stop
    yield start, len(text)

"""What is kept of a document so that its near-duplicates can be found without its text: MinHash's bands.

The resemblance of two documents is the Jaccard similarity s of their sets of word n-grams (Broder 1997). Under a random hash
function the smallest hash of one set is that of the other with probability s. A band is `rows` such minima, and two documents are
taken for near-duplicates where all minima of at least one of `bands` bands are equal:

    P(s) = 1 − (1 − s^rows)^bands          14 × 8: P(0.6) = 0.21, P(0.72) = 0.65, P(0.8) = 0.92, P(0.9) = 1.00

FineWeb's parameters (arXiv:2406.17557) are the defaults; the curve is steepest near (1/bands)^(1/rows) = 0.72. The simplification
of the text (case, digits, punctuation, accents), the hash functions and the minima are datatrove's.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from data.documents import Document
from data.errors import DataError
from data.manifest import Record

# Scripts written without spaces; each of their characters is a word.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
SHINGLES_AT_ONCE = 4096  # n-grams; the hashes of each take 8 bytes a row and band, twice for a moment


class MinHash(Record):
    """Parameters of the search for near-duplicates."""

    ngram: int = Field(default=5, ge=1)  # words
    bands: int = Field(default=14, ge=1, le=100)
    rows: int = Field(default=8, ge=1)  # minima a band


class Dedup(Record):
    """Which duplicates a preparation removes."""

    exact: bool = True  # documents of equal text
    minhash: MinHash | None = None  # documents of nearly equal text


class Signer:
    """MinHash's bands of one document at a time. One for each process.

    Words are what white space separates, and the characters of scripts that have none; not the words of datatrove's spaCy and
    jieba. After the simplification, which leaves no punctuation, spaCy's English words differ from these in one of a thousand, at
    a tenth of the speed; jieba is slower still, leaves a file behind, and knows no classical Chinese. And these words do not
    depend on the identified language, which may differ between two copies of a short text.

    Raises:
        DataError: datatrove is missing.
    """

    def __init__(self, config: MinHash) -> None:
        try:
            import regex
            import xxhash
            from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature

            settings = MinhashConfig(n_grams=config.ngram, num_buckets=config.bands, hashes_per_bucket=config.rows)
            self._minhash = MinhashDedupSignature("memory://", settings)  # its folder; nothing is written into it
        except ImportError as error:
            raise DataError(
                f"dedup.minhash: needs datatrove ({error}); pip install 'rorqual[data]', or set minhash: null"
            ) from None
        self._minhash.word_tokenizer = _Words(regex.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+"))
        self._hash = xxhash.xxh64_intdigest

    def __call__(self, document: Document) -> npt.NDArray[np.uint64] | None:
        """[bands] a key for each band, or None for a document of fewer words than one n-gram."""
        shingles = self._minhash.get_shingles(document.text)  # [S, 1]
        if not len(shingles):
            return None
        parts = np.split(shingles, range(SHINGLES_AT_ONCE, len(shingles), SHINGLES_AT_ONCE))
        minima = np.min([self._minhash.get_signature(part) for part in parts], axis=0).astype("<u8")  # [bands, rows]
        return np.array([self._hash(band.tobytes()) for band in minima], np.uint64)


class _Words:
    """What datatrove's MinHash asks of a word tokenizer."""

    def __init__(self, word: Any) -> None:
        self.word_tokenize = word.findall


def columns(dedup: Dedup) -> list[str]:
    """Columns of a cleaned shard in which equal values mean duplicates: `hash` (sha256), and `band_00` … (uint64, null: no n-gram).

    Each can be compared apart from the others.
    """
    bands = dedup.minhash.bands if dedup.minhash else 0
    return ["hash"] * dedup.exact + [f"band_{band:02d}" for band in range(bands)]

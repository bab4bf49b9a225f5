"""An n-gram model over a byte-level BPE: what a transformer trained on the same bytes must beat clearly.

    python benchmarks/ngram.py --train FILE.jsonl[.xz] --validation FILE.jsonl[.xz] --tokenizer FOLDER [--order 3] [--kneser-ney]

Interpolated absolute discounting (Ney, Essen and Kneser 1994). With h a context of n−1 tokens and h' the same without its oldest,

    P_n(w | h) = max(c(hw) − d_n, 0) / c(h)  +  d_n · N(h) / c(h) · P_{n−1}(w | h'),        P_0 = 1/V

c counts, N(h) is the number of different tokens seen after h, and d_n = n_1/(n_1 + 2·n_2) from the numbers of n-grams seen once and
twice. A context that was never seen leaves P_{n−1}. With `--kneser-ney` (Kneser and Ney 1995) an order below the highest counts the
different tokens before an n-gram in place of its occurrences.

A document ends with EOS, which is predicted and counts in the bits but not in the bytes; its first tokens are predicted from EOS.
"""

import argparse
import json
import lzma
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.tokenizer import encode, eos_token_id, train_bpe, vocab_size

Integers = npt.NDArray[np.int64]
BATCH = 1024  # documents that are tokenised at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--train", type=Path, required=True, help="JSON lines with text and, if they have them, lang and source"
    )
    parser.add_argument("--validation", type=Path, required=True)
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, help="a Hugging Face tokenizer folder")
    tokenizer.add_argument("--vocab-size", type=int, help="train a byte-level BPE of this size on the training text")
    parser.add_argument("--order", type=int, default=3)
    parser.add_argument("--kneser-ney", action="store_true")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.tokenizer or Path(scratch)
        if arguments.vocab_size:
            train_bpe((record["text"] for record in read(arguments.train)), arguments.vocab_size, folder)
        result = measure(folder, arguments.train, arguments.validation, arguments.order, arguments.kneser_ney)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['model']}, vocabulary {result['vocab_size']:,}, {result['train_tokens']:,} tokens of training text")
    for group in ("all", "lang", "source"):
        for name, row in result["validation"][group].items():
            print(f"{group:8}{name:28}{row['bits_per_byte']:8.3f} bits/byte{row['bytes']:12,} bytes")


def measure(folder: Path, train: Path, validation: Path, order: int, kneser_ney: bool) -> dict[str, Any]:
    """Fit on one file, evaluate on another: bits per byte in all, per language and per source."""
    eos, size = eos_token_id(folder), vocab_size(folder)
    stream = Stream.of([ids for ids, _ in tokenize(folder, train)], order, eos)
    model = NGram.fit(stream, order, size, kneser_ney)
    documents, records = zip(*tokenize(folder, validation))
    held_out = Stream.of(documents, order, eos)
    bits = -np.log2(model.probabilities(held_out))
    of_document = np.add.reduceat(bits, np.cumsum([0, *(len(ids) + 1 for ids in documents[:-1])]))
    sums: dict[str, dict[str, list[float]]] = {
        group: defaultdict(lambda: [0, 0]) for group in ("all", "lang", "source")
    }
    for record, document_bits in zip(records, of_document):
        names = {"all": "all", "lang": record.get("lang", "unknown"), "source": record.get("source", "unknown")}
        for group, name in names.items():
            sums[group][name][0] += float(document_bits)
            sums[group][name][1] += len(record["text"].encode())
    return {
        "model": f"{order}-gram, {'Kneser-Ney' if kneser_ney else 'absolute discounting'}",
        "vocab_size": size,
        "train_tokens": int(stream.predicted.sum()),
        "discounts": [table.discount for table in model.tables],
        "validation": {
            group: {name: {"bits_per_byte": b / n, "bytes": n} for name, (b, n) in sorted(rows.items())}
            for group, rows in sums.items()
        },
    }


class Stream(NamedTuple):
    """Documents one after the other, each behind order−1 EOS tokens that are context but not predicted."""

    tokens: Integers  # [M]
    predicted: npt.NDArray[np.bool_]  # [M]

    @classmethod
    def of(cls, documents: Sequence[Integers], order: int, eos: int) -> "Stream":
        start, end = np.full(order - 1, eos), np.full(1, eos)
        tokens = np.concatenate([part for ids in documents for part in (start, ids, end)]).astype(np.int64)
        predicted = np.ones(len(tokens), bool)
        begins = np.cumsum([0, *(len(ids) + order for ids in documents[:-1])])
        for offset in range(order - 1):
            predicted[begins + offset] = False
        return cls(tokens, predicted)


class Table(NamedTuple):
    """The n-grams of one order. An n-gram's number is its place in `keys`; its prefix is an (n−1)-gram's number."""

    keys: Integers  # [U] ascending, prefix · V + last token
    counts: Integers  # [U] 0 for what was seen as context only
    context_counts: npt.NDArray[np.float64]  # [prefixes] c(h)
    followers: Integers  # [prefixes] N(h)
    discount: float


class NGram:
    """The fitted model: one table for each order from 1 up."""

    def __init__(self, tables: list[Table], vocab_size: int):
        self.tables = tables
        self.vocab_size = vocab_size

    @classmethod
    def fit(cls, stream: Stream, order: int, vocab_size: int, kneser_ney: bool) -> "NGram":
        grams = np.zeros(len(stream.tokens), np.int64)  # number of the n-gram that ends at each token
        keys: list[Integers] = []
        counts: list[Integers] = []
        sizes = [1]  # n-grams of each order; of order 0 there is one, the empty one
        for n in range(1, order + 1):
            key = np.roll(grams, 1) * vocab_size + stream.tokens
            found, first, number = np.unique(key, return_index=True, return_inverse=True)
            seen = np.bincount(number[stream.predicted], minlength=len(found))
            if kneser_ney and n > 1:  # the order below counts how many different n-grams end with each of its own
                counts[-1] = np.bincount(grams[first[seen > 0]], minlength=sizes[-1])
            grams = number
            keys.append(found)
            counts.append(seen)
            sizes.append(len(found))
        return cls([_table(k, c, size, vocab_size) for k, c, size in zip(keys, counts, sizes)], vocab_size)

    def probabilities(self, stream: Stream) -> npt.NDArray[np.float64]:
        """P of every predicted token of a stream, in order."""
        p = np.full(len(stream.tokens), 1 / self.vocab_size)
        grams = np.zeros(len(stream.tokens), np.int64)  # number of the n-gram that ends at each token, −1 if never seen
        for table in self.tables:
            context = np.roll(grams, 1)
            key = context * self.vocab_size + stream.tokens
            place = np.searchsorted(table.keys, key).clip(max=len(table.keys) - 1)
            hit = (context >= 0) & (table.keys[place] == key)
            total = np.where(context >= 0, table.context_counts[context], 0)
            discounted = np.where(hit, np.maximum(table.counts[place] - table.discount, 0), 0)
            lower = table.discount * table.followers[context] * p
            p = np.where(total > 0, (discounted + lower) / np.maximum(total, 1), p)
            grams = np.where(hit, place, -1)
        return p[stream.predicted]


def _table(keys: Integers, counts: Integers, prefixes: int, vocab_size: int) -> Table:
    prefix = keys // vocab_size
    once, twice = (int((counts == times).sum()) for times in (1, 2))
    return Table(
        keys,
        counts,
        context_counts=np.bincount(prefix, weights=counts, minlength=prefixes).astype(np.float64),
        followers=np.bincount(prefix[counts > 0], minlength=prefixes),
        discount=once / (once + 2 * twice) if once and twice else 0.5,  # a text too small to say
    )


def tokenize(folder: Path, path: Path) -> Iterator[tuple[Integers, dict[str, Any]]]:
    """Token ids and record of each document."""
    records = read(path)
    while batch := list(islice(records, BATCH)):
        for ids, record in zip(encode(folder, [record["text"] for record in batch]), batch):
            yield np.array(ids, np.int64), record


def read(path: Path) -> Iterator[dict[str, Any]]:
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
        for line in file:
            yield json.loads(line)


if __name__ == "__main__":
    main()

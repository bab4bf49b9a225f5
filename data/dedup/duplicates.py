"""Which documents of a preparation fall as duplicates, from the columns of all its shards.

Every column (the hash of the text, each band of MinHash) is compared by itself: sorted, equal neighbours become edges between
documents. All edges together make a graph, and of each connected component one document stays: that of the source with the
highest priority, and among these the first. So "A is like B, B is like C" keeps one of the three. Documents are numbered through
all shards in the order in which the shards are given.

A fallen document is an *exact* duplicate where another document of equal text goes before it (by priority, then order), else a
*near* one: as if equal texts were removed first, and near-duplicates among the rest.

Memory, in bytes a document: 42 while a band is compared, 90 for the hashes; 1 for the verdicts, and 210 for each document
that has a duplicate, while edges are joined.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet

from data.counts import Count
from data.errors import DataError
from data.manifest import Record
from data.shards import read_columns

KEPT, EXACT, NEAR = 0, 1, 2  # verdicts
MOST_JOINED = 2**31 - 1  # scipy numbers the nodes of a graph with int32
EXAMPLES = 10  # pairs of each kind that are kept to look at
EXAMPLE_CHARACTERS = 500

Edges = npt.NDArray[np.int64]  # [E, 2] numbers of documents


class Cleaned(NamedTuple):
    """One shard of cleaned documents, with the columns `hash`, `bytes` and MinHash's bands."""

    path: Path
    source: str
    priority: int  # of two duplicates, that of the higher priority stays


Kind = Literal["exact", "near"]


class Pair(Record):
    """A document that fell and the one that stayed for it; between them may lie others that resemble both."""

    kind: Kind
    kept: str  # where
    fallen: str
    kept_text: str  # its beginning
    fallen_text: str


class Summary(Record):
    """What the comparison found."""

    removed: dict[str, dict[Kind, Count]]  # by source
    clusters: dict[int, int]  # documents that resemble each other → how many such groups
    examples: list[Pair]


class Decision(NamedTuple):
    """The verdicts, [documents] uint8 for each shard (KEPT, EXACT or NEAR), and what they add up to."""

    verdicts: list[npt.NDArray[np.uint8]]
    summary: Summary


def edges_of(shards: Sequence[Path], column: str) -> Edges:
    """[E, 2] pairs of documents that have equal values in one column; a group of n equal ones gives n − 1 pairs.

    Args:
        shards: all shards, in the order that numbers their documents.
        column: one of `signatures.columns`.
    """
    lengths = _lengths(shards)
    documents = np.empty(sum(lengths), np.int64)
    keys = np.empty(sum(lengths), "S32" if column == "hash" else np.uint64)
    start = filled = 0
    for path, length in zip(shards, lengths):
        values = read_columns(path, [column])[column].combine_chunks()
        valid = np.flatnonzero(values.is_valid())
        part = slice(filled, filled + len(valid))
        documents[part] = start + valid
        keys[part] = _numpy(values.drop_null(), keys.dtype)
        start, filled = start + length, filled + len(valid)
    documents, keys = documents[:filled], keys[:filled]
    order = np.argsort(keys, kind="stable")
    keys, documents = keys[order], documents[order]
    equal = np.flatnonzero(keys[1:] == keys[:-1])
    return np.stack([documents[equal], documents[equal + 1]], axis=1)


def decide(shards: Sequence[Cleaned], edges: Mapping[str, Edges]) -> Decision:
    """Choose what stays.

    Args:
        shards: as for `edges_of`, with their sources.
        edges: for each column its `edges_of`; memory-mapped arrays are read one after the other.
    """
    starts = np.cumsum([0, *_lengths([shard.path for shard in shards])])
    priorities = np.array([shard.priority for shard in shards], np.int64)
    equal = _Groups(_join([edges["hash"]] if "hash" in edges else []), starts, priorities)
    alike = _Groups(_join(edges.values()), starts, priorities)
    verdict = np.full(starts[-1], KEPT, np.uint8)
    verdict[alike.fallen] = NEAR
    verdict[equal.fallen] = EXACT
    verdicts = np.split(verdict, starts[1:-1])[: len(shards)]
    sizes, counts = np.unique(alike.sizes, return_counts=True)
    near = np.flatnonzero(verdict[alike.fallen] == NEAR)
    summary = Summary(
        removed=_removed(shards, verdicts),
        clusters=dict(zip(sizes.tolist(), counts.tolist())),
        examples=_examples("exact", equal.fallen, equal.kept, shards, starts)
        + _examples("near", alike.fallen[near], alike.kept[near], shards, starts),
    )
    return Decision(verdicts, summary)


def _join(edges: Iterable[Edges]) -> Edges:
    """[documents, 2] each document that has a duplicate, with the first of its connected component.

    The graph grows by one column at a time and is cut back to a star for each component, so that its size is that of the
    documents, not of all their edges.
    """
    from scipy.sparse import coo_matrix  # half a second that a look at the recipe need not wait for
    from scipy.sparse.csgraph import connected_components

    stars = np.empty((0, 2), np.int64)
    for more in edges:
        documents, ends = np.unique(np.concatenate([stars, more]), return_inverse=True)
        if len(documents) > MOST_JOINED:
            raise DataError(
                f"dedup: {len(documents):,} documents resemble others; at most {MOST_JOINED:,} can be compared; "
                "prepare the sources as several stores"
            )
        ends = ends.reshape(-1, 2).astype(np.int32)
        graph = coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), (len(documents), len(documents)))
        _, component = connected_components(graph, directed=False)
        _, first = np.unique(component, return_index=True)
        stars = np.stack([documents, documents[first[component]]], axis=1)
    return stars


class _Groups:
    """Documents that resemble each other: who falls, and for whom."""

    def __init__(self, stars: Edges, starts: npt.NDArray[np.int64], priorities: npt.NDArray[np.int64]) -> None:
        document, component = stars.T
        priority = priorities[np.searchsorted(starts, document, side="right") - 1]
        order = np.lexsort((document, -priority, component))
        document, component = document[order], component[order]
        _, first, group, self.sizes = np.unique(component, return_index=True, return_inverse=True, return_counts=True)
        best = document[first[group]]
        falls = np.flatnonzero(document != best)
        falls = falls[np.argsort(document[falls])]
        self.fallen, self.kept = document[falls], best[falls]  # [fallen] each


def _removed(shards: Sequence[Cleaned], verdicts: Sequence[npt.NDArray[np.uint8]]) -> dict[str, dict[Kind, Count]]:
    documents: Counter[tuple[str, int]] = Counter()
    size: Counter[tuple[str, int]] = Counter()
    for shard, verdict in zip(shards, verdicts):
        numbers = read_columns(shard.path, ["bytes"])["bytes"].to_numpy()
        for kind in (EXACT, NEAR):
            documents[shard.source, kind] += int((verdict == kind).sum())
            size[shard.source, kind] += int(numbers[verdict == kind].sum())
    return {
        source: {
            "exact": Count(documents=documents[source, EXACT], bytes=size[source, EXACT]),
            "near": Count(documents=documents[source, NEAR], bytes=size[source, NEAR]),
        }
        for source in dict.fromkeys(shard.source for shard in shards)
    }


def _examples(
    kind: Kind, fallen: Edges, kept: Edges, shards: Sequence[Cleaned], starts: npt.NDArray[np.int64]
) -> list[Pair]:
    """Pairs spread evenly over the fallen documents."""
    chosen = np.unique(np.linspace(0, len(fallen) - 1, min(EXAMPLES, len(fallen))).astype(np.int64))
    wanted = np.unique([fallen[chosen], kept[chosen]])
    found: dict[int, tuple[str, str]] = {}
    for number in np.unique(np.searchsorted(starts, wanted, side="right") - 1):
        rows = wanted[(wanted >= starts[number]) & (wanted < starts[number + 1])]
        table = read_columns(shards[number].path, ["where", "text"]).take(rows - starts[number])
        for document, row in zip(rows.tolist(), table.to_pylist()):
            found[document] = (row["where"], row["text"][:EXAMPLE_CHARACTERS])
    return [
        Pair(kind=kind, kept=found[k][0], fallen=found[f][0], kept_text=found[k][1], fallen_text=found[f][1])
        for f, k in zip(fallen[chosen].tolist(), kept[chosen].tolist())
    ]


def _lengths(shards: Sequence[Path]) -> list[int]:
    return [pyarrow.parquet.read_metadata(path).num_rows for path in shards]


def _numpy(values: pyarrow.Array, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Values of fixed width without nulls, without a copy."""
    return np.frombuffer(values.buffers()[1], dtype, len(values), values.offset * dtype.itemsize)

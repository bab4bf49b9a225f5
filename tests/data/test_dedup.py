"""Duplicates: what is found and with which probability, what stays, and that datatrove's own pipeline finds the same."""

import random
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from math import sqrt
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pyarrow
import pytest

from data.dedup.duplicates import Cleaned, Decision, decide, edges_of
from data.dedup.signatures import Dedup, MinHash, Signer, columns
from data.documents import Document, text_hash
from data.errors import DataError
from data.shards import write_shard

FINEWEB = Dedup(minhash=MinHash())
SEA = (
    "whale sea deep song winter north ice krill wave light boat storm gull shore salt wind harbour dive breath fluke fin calf pod "
    "net rope sail moon tide current plankton stone sand blue grey cold far near under over old young slow great"
)


def test_near_duplicates_are_found_as_often_as_the_parameters_promise(tmp_path: Path) -> None:
    # A pair: two documents of m 5-grams each, the first c of them in common, all words different. So s = c / (2m − c).
    pairs = 300
    vocabulary = ("".join(letters) for letters in product(ascii_lowercase, repeat=5))
    for similarity, (m, c) in {
        0.50: (60, 40),
        0.60: (60, 45),
        0.72: (43, 36),
        0.80: (54, 48),
        0.90: (57, 54),
        0.95: (39, 38),
    }.items():
        texts = []
        for _ in range(pairs):
            common = [next(vocabulary) for _ in range(c + 4)]
            for _ in range(2):
                texts.append(" ".join([*common, *(next(vocabulary) for _ in range(m - c))]))
            assert jaccard(*texts[-2:]) == pytest.approx(similarity)
        found = duplicates([documents(texts)], tmp_path / str(similarity))
        fallen = np.flatnonzero(found.verdicts[0])
        assert (fallen % 2 == 1).all()  # the second of a pair for the first, and nothing across pairs
        assert found.summary.clusters == ({2: len(fallen)} if len(fallen) else {})
        promised = 1 - (1 - similarity**8) ** 14  # .053 .211 .650 .924 .9996 1.000
        assert abs(len(fallen) / pairs - promised) <= 4 * sqrt(promised * (1 - promised) / pairs) + 1 / pairs, (
            similarity
        )


def test_every_exact_duplicate_is_found_however_short(tmp_path: Path) -> None:
    texts = [f"{number % 700}" * (number % 5 + 1) for number in range(2000)]  # 700 different ones, none with five words
    found = duplicates([documents(texts[:900]), documents(texts[900:])], tmp_path)
    assert np.concatenate(found.verdicts).tolist() == [
        int(texts.index(text) < number) for number, text in enumerate(texts)
    ]
    assert sum(size * many for size, many in found.summary.clusters.items()) == 2000


def test_a_text_too_short_for_an_n_gram_has_no_near_duplicates(tmp_path: Path) -> None:
    sign = Signer(MinHash())
    assert sign(Document("four words are few", "a")) is None
    assert sign(Document("", "a")) is None
    five = sign(Document("five words are just enough", "a"))
    assert five is not None and five.shape == (14,) and five.dtype == np.uint64
    found = duplicates([documents(["one two three four", "One, two, three, four!"])], tmp_path)
    assert found.verdicts[0].tolist() == [0, 0]


def test_case_punctuation_digits_and_accents_make_no_difference() -> None:
    sign = Signer(MinHash())
    plain = sign(Document("le cafe de la gare ferme a 0 heures", "a"))
    other = sign(Document("Le  Café de la gare\nferme à 23,5 heures!", "b"))
    assert plain is not None and other is not None
    assert plain.tolist() == other.tolist()


def test_an_equal_text_is_exact_and_a_similar_one_near(tmp_path: Path) -> None:
    text = sentence(200, seed=1)
    similar = text.replace(text.split()[100], "xylophone", 1)
    found = duplicates([documents([text, "something else entirely, five words", similar, text, similar])], tmp_path)
    # The last is equal to the third, which is only similar to the first: without equal texts, the third would still have fallen.
    assert found.verdicts[0].tolist() == [0, 0, 2, 1, 1]
    removed = found.summary.removed["source 0"]
    assert (removed["exact"].documents, removed["near"].documents) == (2, 1)
    assert removed["near"].bytes == len(similar.encode())
    assert found.summary.clusters == {4: 1}
    kinds = [(pair.kind, pair.kept, pair.fallen) for pair in found.summary.examples]
    assert kinds == [("exact", "0:0", "0:3"), ("exact", "0:2", "0:4"), ("near", "0:0", "0:2")]
    assert found.summary.examples[0].kept_text == text[:500]


def test_the_source_of_higher_priority_keeps_its_document(tmp_path: Path) -> None:
    text = sentence(200, seed=2)
    similar = text.replace(text.split()[50], "xylophone", 1)
    sources = [
        documents([text, sentence(100, seed=3)]),
        documents([similar]),
        documents([sentence(90, seed=4), similar]),
    ]
    assert lists(duplicates(sources, tmp_path / "equal")) == [[0, 0], [2], [0, 1]]
    assert lists(duplicates(sources, tmp_path / "last", priorities=[0, 0, 5])) == [[2, 0], [1], [0, 0]]
    assert lists(duplicates(sources, tmp_path / "middle", priorities=[-1, 2, 1])) == [[2, 0], [0], [0, 1]]


def test_a_chain_of_similar_documents_keeps_one(tmp_path: Path) -> None:
    # Each step replaces 10 of 300 words, so neighbours have s > 0.9 and the ends nearly nothing in common.
    words = sentence(300, seed=5).split()
    chain = []
    for step in range(30):
        chain.append(" ".join(words))
        words[step * 10 : step * 10 + 10] = [f"{letter}{'aeiou'[step % 5]}{step * 'x'}" for letter in "bcdfghjklm"]
    assert jaccard(chain[0], chain[-1]) < 0.05
    random.Random(0).shuffle(chain)
    found = duplicates([documents(chain[:7]), documents(chain[7:])], tmp_path)
    assert lists(found) == [[0, *[2] * 6], [2] * 23]
    assert found.summary.clusters == {30: 1}


def test_chinese_is_compared_by_its_characters(tmp_path: Path) -> None:
    text = "北冥有魚其名為鯤鯤之大不知其幾千里也化而為鳥其名為鵬鵬之背不知其幾千里也怒而飛其翼若垂天之雲是鳥也海運則將徙於南冥"
    punctuated = "北冥有魚，其名為鯤。" + text[8:]
    different = (
        "道可道非常道名可名非常名無名天地之始有名萬物之母故常無欲以觀其妙常有欲以觀其徼此兩者同出而異名同謂之玄玄之又玄"
    )
    found = duplicates([documents([text, punctuated, different])], tmp_path)
    assert lists(found) == [[0, 2, 0]]
    sign = Signer(MinHash())
    assert sign(Document("北冥有魚也", "five characters")) is not None
    assert sign(Document("北冥有魚", "four")) is None


def test_shards_and_the_order_of_columns_make_no_difference(tmp_path: Path) -> None:
    texts = families(60, seed=6)
    whole = duplicates([documents(texts)], tmp_path / "whole")
    cut = duplicates([documents(texts)], tmp_path / "cut", sizes=[1, 0, 50, len(texts) - 51])
    assert np.concatenate(cut.verdicts).tolist() == whole.verdicts[0].tolist()
    assert cut.summary == whole.summary
    backwards = duplicates([documents(texts)], tmp_path / "backwards", order=reversed(columns(FINEWEB)))
    assert backwards.summary == whole.summary
    assert lists(backwards) == lists(whole)
    assert 20 < np.count_nonzero(whole.verdicts[0]) < len(texts) - 20


def test_more_documents_than_a_graph_can_number_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.dedup.duplicates.MOST_JOINED", 1)
    with pytest.raises(DataError, match="dedup: 2 documents resemble others; at most 1 can be compared; prepare"):
        duplicates([documents(["The same.", "The same."])], tmp_path, Dedup())


def test_scipy_is_not_read_before_there_is_something_to_compare() -> None:
    look = "import sys, data.dedup.duplicates; sys.exit(any(name.startswith('scipy') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", look], check=True)


def test_without_minhash_or_without_hashes_the_other_still_works(tmp_path: Path) -> None:
    text = sentence(100, seed=7)
    texts = [text, text, text.upper()]
    assert lists(duplicates([documents(texts)], tmp_path / "exact", Dedup())) == [[0, 1, 0]]
    assert lists(duplicates([documents(texts)], tmp_path / "near", Dedup(exact=False, minhash=MinHash()))) == [
        [0, 2, 2]
    ]
    nothing = duplicates([documents(texts)], tmp_path / "nothing", Dedup(exact=False))
    assert lists(nothing) == [[0, 0, 0]]
    assert nothing.summary.clusters == {} and nothing.summary.examples == []


def test_a_long_document_has_the_signature_of_its_whole_set() -> None:
    import xxhash
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

    text = sentence(9000, seed=8)
    theirs = MinhashDedupSignature("memory://")
    minima = theirs.get_signature(theirs.get_shingles(text))  # all n-grams at once
    expected = [xxhash.xxh64_intdigest(struct.pack("<8Q", *band)) for band in minima]
    keys = Signer(MinHash())(Document(text, "a"))
    assert keys is not None and keys.tolist() == expected


def test_datatrove_finds_the_same_clusters(tmp_path: Path) -> None:
    texts = families(80, seed=9)
    half = len(texts) // 2
    shards = write([documents(texts)], tmp_path, FINEWEB, [half, len(texts) - half])
    ours = clusters(np.concatenate([edges_of([shard.path for shard in shards], c) for c in columns(FINEWEB)]).tolist())
    assert ours == datatrove_clusters([texts[:half], texts[half:]], tmp_path / "datatrove")
    assert len(ours) > 20 and max(map(len, ours)) > 2


def datatrove_clusters(files: Sequence[Sequence[str]], folder: Path) -> set[frozenset[int]]:
    """Clusters of the numbers of documents, by the untouched steps of datatrove with its words of English."""
    from datatrove.data import Document as Theirs
    from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature

    signatures, pairs, groups = (str(folder / name) for name in ("signatures", "pairs", "groups"))
    for rank, texts in enumerate(files):
        MinhashDedupSignature(signatures).run([Theirs(text, str(n)) for n, text in enumerate(texts)], rank, len(files))
    for band in range(14):
        list(MinhashDedupBuckets(signatures, pairs).run(None, band, 14) or [])
    MinhashDedupCluster(pairs, groups, save_cluster_id=True).run(None, 0, 1)
    members: dict[int, set[int]] = {}
    for rank in range(len(files)):
        start = sum(map(len, files[:rank]))
        for document, group in struct.iter_unpack("<2I", (folder / "groups" / f"{rank:06d}.clusters").read_bytes()):
            members.setdefault(group, set()).add(start + document)
    return {frozenset(group) for group in members.values()}


def clusters(edges: Iterable[tuple[int, int]]) -> set[frozenset[int]]:
    """Connected components, by merging sets."""
    of: dict[int, set[int]] = {}
    for a, b in edges:
        merged = of.get(a, {a}) | of.get(b, {b})
        for member in merged:
            of[member] = merged
    return {frozenset(group) for group in of.values()}


def duplicates(
    sources: Sequence[Sequence[Document]],
    folder: Path,
    dedup: Dedup = FINEWEB,
    priorities: Sequence[int] = (0, 0, 0),
    sizes: Sequence[int] | None = None,
    order: Iterable[str] | None = None,
) -> Decision:
    """Everything a preparation does about duplicates."""
    shards = write(sources, folder, dedup, sizes, priorities)
    edges = {column: edges_of([shard.path for shard in shards], column) for column in order or columns(dedup)}
    return decide(shards, edges)


def write(
    sources: Sequence[Sequence[Document]],
    folder: Path,
    dedup: Dedup,
    sizes: Sequence[int] | None = None,
    priorities: Sequence[int] = (0, 0, 0),
) -> list[Cleaned]:
    """A shard a source, or the first source in shards of the given sizes."""
    folder.mkdir(exist_ok=True)
    parts = [("source 0", 0, part) for part in split(sources[0], sizes)] if sizes else []
    parts = parts or [(f"source {n}", priorities[n], part) for n, part in enumerate(sources)]
    sign = Signer(dedup.minhash) if dedup.minhash else None
    shards = []
    for number, (source, priority, part) in enumerate(parts):
        table = {
            "hash": pyarrow.array([text_hash(document.text) for document in part], pyarrow.binary(32)),
            "bytes": np.array([document.size for document in part], np.int64),
        }
        keys = [sign(document) for document in part] if sign else []
        for band, column in enumerate(columns(Dedup(exact=False, minhash=dedup.minhash))):
            values = [None if key is None else int(key[band]) for key in keys]
            table[column] = pyarrow.array(values, pyarrow.uint64())
        write_shard(folder / f"{number}.parquet", part, table)
        shards.append(Cleaned(folder / f"{number}.parquet", source, priority))
    return shards


def split(documents: Sequence[Document], sizes: Sequence[int]) -> list[Sequence[Document]]:
    ends = np.cumsum(sizes).tolist()
    return [documents[end - size : end] for end, size in zip(ends, sizes)]


def documents(texts: Sequence[str]) -> list[Document]:
    return [Document(text, f"0:{number}") for number, text in enumerate(texts)]


def lists(found: Decision) -> list[list[int]]:
    return [verdict.tolist() for verdict in found.verdicts]


def sentence(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(SEA.split(), k=words))


def families(number: int, seed: int) -> list[str]:
    """Documents with none to three descendants each, in which up to every fifteenth word is another, in a random order."""
    chance = random.Random(seed)
    texts = []
    for _ in range(number):
        words = chance.choices(SEA.split(), k=chance.randint(30, 120))
        texts.append(" ".join(words))
        for _ in range(chance.randint(0, 3)):
            changed = [chance.choice(SEA.split()) if chance.random() < chance.random() / 15 else word for word in words]
            texts.append(" ".join(changed))
    chance.shuffle(texts)
    return texts


def jaccard(a: str, b: str) -> float:
    """Of the sets of word 5-grams."""
    one, other = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a.split(), b.split()))
    return len(one & other) / len(one | other)

"""Best-fit packing: no document is cut that fits, and every target is trained on once at every depth."""

import random
from bisect import bisect_left, insort
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch

import data.packing
from data.errors import DataError
from data.packing import PADDING, PackedRows, best_fit, pack, packed_file, packing_statistics
from data.samples import Phase, Samples, StoreEntry
from model.loss import targets_at
from model.ops.cross_entropy import IGNORE

T, D_MTP = 64, 2


def item_by_item(lengths, capacity):
    """The room left in each bin by best-fit decreasing as it is written in the paper, ascending."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        place = bisect_left(rooms, length)
        insort(rooms, (rooms.pop(place) if place < len(rooms) else capacity) - length)
    return rooms


def test_best_fit_is_the_packing_of_the_item_by_item_algorithm():
    numbers = np.random.default_rng(0)
    for _ in range(200):
        capacity, n = int(numbers.integers(1, 60)), int(numbers.integers(1, 150))
        lengths = numbers.integers(1, capacity + 1, n)
        used = np.bincount(best_fit(lengths, capacity), lengths).astype(int)
        assert sorted((capacity - used).tolist()) == item_by_item(lengths.tolist(), capacity)


def test_best_fit_equals_a_worked_example():
    # 7 opens a bin, 6 a second, 4 a third; 3 fits best beside 7, the next 3 and 4 beside 6 and 4: [7 3] [6 4] [4 3]
    bins = best_fit(np.array([3, 7, 4, 6, 3, 4]), 10)
    assert sorted(sorted(np.array([3, 7, 4, 6, 3, 4])[bins == b].tolist()) for b in range(3)) == [
        [3, 4],
        [3, 7],
        [4, 6],
    ]
    assert best_fit(np.zeros(0, np.int64), 10).tolist() == []


@pytest.fixture(scope="module")
def rows(tiny_store):
    """{source: (its documents, (tokens, documents) of each of its rows)}"""
    found = {}
    for source in tiny_store.sources("train"):
        packed = PackedRows(source, packed_file(tiny_store, source, T), tiny_store.manifest.eos_token_id)
        tokens = np.full((len(packed), T + 1 + D_MTP), -9, np.int64)
        numbers = np.full((len(packed), T + 1 + D_MTP), -9, np.int32)
        packed.fill(tokens, numbers, np.arange(len(packed)), np.arange(len(packed)))
        lengths = source.lengths()
        ends = np.cumsum(lengths)
        documents = [source.read(int(end - length), int(end)).tolist() for length, end in zip(lengths, ends)]
        found[source.name] = documents, torch.from_numpy(tokens), torch.from_numpy(numbers)
    return found


@pytest.mark.parametrize("source", ["verse", "code"])
def test_every_target_of_every_document_is_trained_on_once_at_every_depth(rows, source):
    """Inside its document: a document of L tokens has L − 1 − k targets at depth k, each at its place in the text."""
    documents, tokens, numbers = rows[source]
    for depth in range(D_MTP + 1):
        labels = targets_at(tokens, numbers, depth, D_MTP, mask_documents=True)
        found = Counter()
        for row, position in (labels != IGNORE).nonzero().tolist():
            found[int(numbers[row, position]), int(tokens[row, position]), int(labels[row, position])] += 1
        expected = Counter(
            (number, document[i], document[i + 1 + depth])
            for number, document in enumerate(documents)
            for i in range(len(document) - 1 - depth)
        )
        assert found == expected


@pytest.mark.parametrize("source", ["verse", "code"])
def test_a_document_that_fits_lies_whole_in_one_row_and_a_longer_one_in_pieces_of_full_length(rows, source):
    documents, tokens, numbers = rows[source]
    places = {}
    for row, inside in enumerate(numbers[:, : T + 1].tolist()):
        for number in set(inside) - {PADDING}:
            at = [i for i, other in enumerate(inside) if other == number]
            assert at == list(range(at[0], at[-1] + 1))
            places.setdefault(number, []).append(tokens[row, at].tolist())
    assert sorted(places) == list(range(len(documents)))
    cut = 0
    for number, document in enumerate(documents):
        pieces = [document[start : start + T + 1] for start in range(0, max(len(document) - 1, 1), T)]
        assert sorted(places[number]) == sorted(pieces)
        cut += len(pieces) > 1
    assert 0 < cut < len(documents)


def test_padding_stands_at_the_end_and_has_no_target(rows):
    for _, tokens, numbers in rows.values():
        assert (numbers >= PADDING).all() and (tokens >= 0).all()
        padded = numbers == PADDING
        assert (padded.int().diff(dim=1) >= 0).all()
        for depth in range(D_MTP + 1):
            labels = targets_at(tokens, numbers, depth, D_MTP, mask_documents=False)
            ahead = padded[:, 1 + depth : 1 + depth + T] | padded[:, :T]
            assert ((labels == IGNORE) == ahead).all()


def test_rows_are_packed_group_by_group_in_a_file_that_is_read_again(tiny_store, tmp_path, monkeypatch):
    """The same bytes on every machine; smaller groups give other rows of the same documents."""
    source = tiny_store.sources("train")[0]
    pack(source, T, tmp_path / "one")
    pack(source, T, tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    monkeypatch.setattr(data.packing, "GROUP", 10)
    pack(source, T, tmp_path / "groups")
    one, groups = (PackedRows(source, tmp_path / name, 0) for name in ("one", "groups"))
    of_one, of_groups = ([rows.pieces(number).tolist() for number in range(len(rows))] for rows in (one, groups))
    assert len(one) <= len(groups) and sorted(chain(*of_one)) == sorted(chain(*of_groups))
    assert all(len({document // 10 for _, _, document in row}) == 1 for row in of_groups)


def test_a_flipped_bit_in_the_rows_is_found_before_it_is_used(tiny_store, tmp_path):
    source, draw = tiny_store.sources("train")[0], random.Random(0)
    pack(source, T, path := tmp_path / "rows")
    written = path.read_bytes()
    for byte in draw.sample(range(len(written)), 40):
        damaged = bytearray(written)
        damaged[byte] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{path}: .*; delete it, and it is made again"):
            rows = PackedRows(source, path, 0)
            [rows.pieces(number) for number in range(len(rows))]


def test_a_store_that_cannot_be_written_is_packed_in_the_cache(tiny_store, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (source, _) = tiny_store.sources("train")
    beside = packed_file(tiny_store, source, T)
    assert beside.parent == tiny_store.path / "packing"
    monkeypatch.setattr(data.packing, "BESIDE", "manifest.json")  # a file: no folder can be made of it
    cached = packed_file(tiny_store, source, T)
    assert cached.parent == tmp_path / ".cache" / "rorqual" / "packing"
    assert cached.read_bytes() == beside.read_bytes()


def test_a_damaged_file_of_rows_is_refused(tiny_store, tmp_path):
    source = tiny_store.sources("train")[0]
    pack(source, T, tmp_path / "rows")
    whole = (tmp_path / "rows").read_bytes()
    for content in (whole[:-8], b"", b"\0" * len(whole)):
        (tmp_path / "rows").write_bytes(content)
        with pytest.raises(DataError, match=r"rows: \d+ bytes that are no packed rows; delete it"):
            PackedRows(source, tmp_path / "rows", 0)


def test_packed_rows_are_drawn_in_an_order_of_their_own_and_each_once_an_epoch(tiny_store):
    entries = [StoreEntry(tiny_store.path)]
    samples = Samples([Phase(0, entries, T, "best_fit")], D_MTP, seed=0)
    (read,) = (read for read in samples.read(1000).values() if read.source == "verse")
    rows = round(read.samples / read.epochs)
    drawn, i = [], 0
    while len(drawn) < rows:
        if samples.samples_by_source(i + 1)["verse"] > samples.samples_by_source(i)["verse"]:
            drawn.append(tuple(samples[i][0].tolist()))
        i += 1
    assert len(set(drawn)) == rows


def test_statistics_of_a_worked_example():
    # T = 4: rows of 5. Documents of 3, 5, 2 and 9 tokens, 19 in all. Windows end at 4, 8, 12 and 16: 18 // 4 = 4 of them.
    # [0, 3) is whole, [3, 8) is cut at 4 and [10, 19) at 12; [8, 10) is whole. Of those cut, the one of 5 would fit.
    # Packed: 9 = 5 + 5 sharing a token, two full rows; 5 a full row; 3 + 2 a full row. 4 rows with 4 targets each: no padding.
    found = packing_statistics([np.array([3, 5, 2, 9])], 4)
    assert found["concat"] == {"sequences": 4, "cut": 0.5, "cut_needlessly": 0.25, "padding": 0.0}
    assert found["best_fit"] == {"sequences": 4, "cut": 0.25, "cut_needlessly": 0.0, "padding": 0.0}
    assert packing_statistics([np.array([2])], 4)["best_fit"]["padding"] == 0.75  # one target in four positions


def test_statistics_are_those_of_the_rows(tiny_store, rows):
    found = packing_statistics([source.lengths() for source in tiny_store.sources("train")], T)["best_fit"]
    numbers = torch.cat([numbers for _, _, numbers in rows.values()])
    targets = (numbers[:, 1 : T + 1] >= 0) & (numbers[:, :T] >= 0)
    assert found["sequences"] == len(numbers)
    assert found["padding"] == pytest.approx(float(1 - targets.double().mean()))

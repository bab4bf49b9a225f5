"""Samples: right targets, every sequence once an epoch, and an order that depends on the index alone, also where phases change."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.manifest import Manifest
from data.samples import Phase, Read, Samples, StoreEntry

T, D_MTP = 32, 2
WIDTH = T + 1 + D_MTP


@pytest.fixture(scope="module")
def samples(tiny_store):
    return one_phase(tiny_store)


def one_phase(store, length=T, seed=0, **entry):
    return Samples([Phase(0, [StoreEntry(store.path, **entry)], length)], D_MTP, seed)


def streams(store, split):
    """Every source's packed stream, token by token, put together the slow way: {source: (tokens, document of each)}."""
    result = {}
    for span in store.manifest.splits[split].sources:
        documents = [store.split(split).document(n) for n in range(span.first_document, span.last_document + 1)]
        numbers = np.concatenate([np.full(len(d), n) for n, d in enumerate(documents)])
        result[span.name] = np.concatenate(documents).astype(np.int64), numbers
    return result


def windows(store, length):
    """{tokens of a window: (source, number, documents)}"""
    found = {}
    width = length + 1 + D_MTP
    for name, (tokens, numbers) in streams(store, "train").items():
        for start in range(0, len(tokens) - width + 1, length):
            found[tuple(tokens[start : start + width])] = name, start // length, numbers[start : start + width].tolist()
    return found


def test_a_sample_is_a_window_of_its_source_with_real_targets(tiny_store, samples):
    known = windows(tiny_store, T)
    for i in range(200):
        tokens, documents = samples[i]
        assert tokens.dtype == torch.int64 and documents.dtype == torch.int32
        assert tokens.shape == documents.shape == (WIDTH,)
        assert documents.tolist() == known[tuple(tokens.tolist())][2]


def drawn(samples, known, first, last):
    """(source, number of the window) of samples first … last−1."""
    return [known[tuple(row)][:2] for row in samples.batch(first, last - first).tokens.tolist()]


def test_an_epoch_of_a_source_has_each_window_once_and_the_next_in_another_order(tiny_store, samples):
    known = windows(tiny_store, T)
    counts = {name: sum(source == name for source, _, _ in known.values()) for name in ("verse", "code")}
    order = drawn(samples, known, 0, 8 * max(counts.values()))
    for name, count in counts.items():
        numbers = [number for source, number in order if source == name]
        epochs = [numbers[start : start + count] for start in range(0, len(numbers) - count + 1, count)]
        assert len(epochs) >= 2
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_a_sample_depends_on_its_index_alone(tiny_store, samples):
    expected = [samples[i] for i in range(40)]
    again = one_phase(tiny_store)
    for i in (39, 0, 17, 3):
        assert torch.equal(again[i][0], expected[i][0]) and torch.equal(again[i][1], expected[i][1])
    batch = again.batch(5, 20)
    assert torch.equal(batch.tokens, torch.stack([tokens for tokens, _ in expected[5:25]]))
    assert torch.equal(batch.documents, torch.stack([documents for _, documents in expected[5:25]]))


def test_another_seed_gives_another_order(tiny_store, samples):
    other = one_phase(tiny_store, seed=1)
    assert sum(torch.equal(samples[i][0], other[i][0]) for i in range(50)) < 10


def test_samples_follow_the_weights_and_are_counted(samples):
    assert samples.samples_by_source(0) == {"verse": 0, "code": 0}
    consumed = samples.samples_by_source(1000)
    assert abs(consumed["verse"] - 750) <= 3 and sum(consumed.values()) == 1000
    assert samples.tokens_by_source(1000) == {source: T * count for source, count in consumed.items()}
    reads = {read.source: read for read in samples.read(1000).values()}
    assert samples.epochs(1000) == {source: read.epochs for source, read in reads.items()}


def test_max_epochs_ends_the_samples_with_an_error_that_names_the_source(tiny_store, samples):
    limited = one_phase(tiny_store, max_epochs=2)
    n = limited.available
    assert max(limited.epochs(n).values()) <= 2 < max(limited.epochs(n + 1).values())
    limited[n - 1]
    with pytest.raises(DataError, match=rf"{n + 1} samples need \d+ of source \w+, max_epochs allows \d+"):
        limited[n]
    assert samples.available is None


def test_two_stores_keep_their_shares_and_names(tiny_store, tmp_path):
    (tmp_path / "other").symlink_to(tiny_store.path)
    entries = [StoreEntry(tiny_store.path, 1), StoreEntry(tmp_path / "other", 3)]
    with pytest.raises(DataError, match="two sources are called store/verse"):
        Samples([Phase(0, [entries[0], entries[0]], T)], D_MTP, seed=0, by_store=True)
    other = altered_copy(tiny_store, tmp_path / "third")
    both = Samples([Phase(0, [entries[0], StoreEntry(other, 3)], T)], D_MTP, seed=0)
    consumed = both.samples_by_source(16_000)
    expected = {"store/verse": 3000, "store/code": 1000, "third/verse": 9000, "third/code": 3000}
    assert all(abs(consumed[name] - count) < 5 for name, count in expected.items())


def altered_copy(store, path):
    """A store with the same tokens which says that they come from another file."""
    path.mkdir()
    for file in store.path.iterdir():
        (path / file.name).symlink_to(file)
    (path / "manifest.json").unlink()
    manifest = store.manifest.model_dump()
    manifest["files"]["train.bin"]["sha256"] = "0" * 64
    Manifest.model_validate(manifest).write(path)
    return path


def test_one_text_under_two_names_is_refused(tiny_store, tmp_path):
    """Each would be read as if the other were not there, and twice as often as `epochs` says."""
    (tmp_path / "other").symlink_to(tiny_store.path)
    with pytest.raises(DataError, match=r"data.train: .*other and .*store hold the same; name one of them"):
        Samples([Phase(0, [StoreEntry(tiny_store.path), StoreEntry(tmp_path / "other")], T)], D_MTP, seed=0)


def test_a_source_shorter_than_a_sample_is_refused(tiny_store):
    with pytest.raises(DataError, match=r"data.sequence_length = 1000000: source verse of .* lower it"):
        one_phase(tiny_store, 1_000_000)


def test_a_weight_too_small_for_a_single_sample_is_refused(tiny_store, tmp_path):
    other = altered_copy(tiny_store, tmp_path / "other")
    for weight in (1e-16, 1e-320):
        with pytest.raises(DataError, match=r"data.train: source other/verse has .* of the weight; .* or leave it out"):
            Samples([Phase(0, [StoreEntry(tiny_store.path), StoreEntry(other, weight)], T)], D_MTP, seed=0)


def test_a_phase_with_other_weights_goes_on_where_the_sources_were_left(tiny_store, tmp_path):
    """Nothing comes twice before an epoch ends, whatever the mixture was."""
    known = windows(tiny_store, T)
    other = altered_copy(tiny_store, tmp_path / "other")
    alone, both = [StoreEntry(tiny_store.path)], [StoreEntry(tiny_store.path), StoreEntry(other, 0.25)]
    changing = Samples([Phase(0, alone, T), Phase(100, both, T), Phase(300, alone, T)], D_MTP, seed=0)
    steady = Samples([Phase(0, alone, T)], D_MTP, seed=0, by_store=True)
    names = {"store/verse": "verse", "store/code": "code"}
    for n in (0, 1, 99, 100, 101, 250, 300, 301, 400):
        counts = changing.samples_by_source(n)
        assert sum(counts.values()) == n
        assert counts["other/verse"] + counts["other/code"] == pytest.approx(max(min(n, 300) - 100, 0) * 0.2, abs=3)
    own = {name: [] for name in names.values()}
    for i in [*range(100), *range(300, 400)]:
        source, number = known[tuple(changing[i][0].tolist())][:2]
        own[source].append((changing.samples_by_source(i)[f"store/{source}"], number))
    reference = {name: [n for source, n in drawn(steady, known, 0, 600) if source == name] for name in own}
    for source, places in own.items():
        assert [number for _, number in places] == [reference[source][index] for index, _ in places]


def test_another_length_is_another_order_and_the_old_one_waits(tiny_store):
    """32 → 48 → 32: the third phase goes on in the windows of 32 where the first stopped."""
    entries = [StoreEntry(tiny_store.path)]
    changing = Samples([Phase(0, entries, T), Phase(60, entries, 48), Phase(120, entries, T)], D_MTP, seed=0)
    assert [changing.width(i) - 1 - D_MTP for i in (59, 60, 119, 120)] == [T, 48, 48, T]
    assert changing.tokens_by_source(180)["verse"] == sum(
        read.samples * read.sequence_length for read in changing.read(180).values() if read.source == "verse"
    )
    short, long = windows(tiny_store, T), windows(tiny_store, 48)
    first, second, third = (drawn(changing, *part) for part in ((short, 0, 60), (long, 60, 120), (short, 120, 180)))
    assert len({*first, *third}) == 120
    assert len(set(second)) == 60
    steady = Samples([Phase(0, entries, 48)], D_MTP, seed=0)
    assert drawn(steady, long, 0, 60) == second


def test_samples_that_start_in_the_middle_are_those_of_samples_that_did_not(tiny_store, tmp_path):
    """What has been read, through JSON as in a checkpoint, is all that the later phases need of the earlier ones."""
    other = altered_copy(tiny_store, tmp_path / "other")
    phases = [
        Phase(0, [StoreEntry(tiny_store.path)], T),
        Phase(50, [StoreEntry(tiny_store.path), StoreEntry(other, 2)], T),
        Phase(90, [StoreEntry(other)], 48, "best_fit"),
        Phase(130, [StoreEntry(tiny_store.path), StoreEntry(other)], T),
    ]
    whole = Samples(phases, D_MTP, seed=0)
    for start in range(1, len(phases)):
        first = phases[start].first_sample
        text = json.dumps({name: asdict(read) for name, read in whole.read(first).items()})
        read = {name: Read(**record) for name, record in json.loads(text).items()}
        rest = Samples(phases[start:], D_MTP, seed=0, read=read, by_store=True)
        for i in (first, first + 7, 131, 149):
            if i >= first:
                assert torch.equal(whole[i][0], rest[i][0])
        assert rest.tokens_by_source(160) == whole.tokens_by_source(160)
        assert rest.epochs(160) == pytest.approx(whole.epochs(160))

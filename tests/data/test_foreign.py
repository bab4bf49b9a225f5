"""Files that Megatron-LM and datatrove write become stores, and theirs read ours, token for token."""

import logging
import random
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.foreign import ForeignSource, export_store, import_store
from data.indexed import write_indexed
from data.samples import Phase, Samples, StoreEntry
from data.store import inspect_document, store_stats, verify_store
from data.tokenizer import EOS, encode, train_bpe

END = 1


def some_text(documents, seed=0):
    draw = random.Random(seed)
    snippets = ("void f() {\n  return;\n}\n", "他说：“好。”\n", "👩‍🚀 e\u0301!\n", "Call me Ishmael. ")
    return ["".join(draw.choices(snippets, k=draw.randint(1, 20))) + str(n) for n in range(documents)]


TEXTS = some_text(120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "tokenizer"
    train_bpe(TEXTS, 400, folder)
    return folder


@pytest.fixture(scope="module")
def documents(folder):
    return [np.array([*ids, END]) for ids in encode(folder, TEXTS)]


@pytest.fixture(scope="module")
def megatron():
    """What of megatron.core writes and reads token files."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    logging.disable(logging.NOTSET)
    return SimpleNamespace(IndexedDataset=IndexedDataset, IndexedDatasetBuilder=IndexedDatasetBuilder)


@pytest.fixture(scope="module")
def datatrove():
    """What of datatrove writes and reads token files, without its log."""
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.dataset import DatatroveFileDataset
    from loguru import logger

    logger.disable("datatrove")
    return SimpleNamespace(
        Document=Document, DocumentTokenizer=DocumentTokenizer, DatatroveFileDataset=DatatroveFileDataset
    )


def write_megatron(megatron, prefix, documents, dtype=np.uint16, sentences=1):
    """As preprocess_data does it: a document is an array, here in up to so many sequences."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        lengths = [len(part) for part in np.array_split(document, sentences)]
        builder.add_document(document, lengths)
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_datatrove(datatrove, target, folder, texts, **options):
    documents = (datatrove.Document(text=text, id=str(n)) for n, text in enumerate(texts))
    options = {"eos_token": EOS, "shuffle_documents": False, **options}
    datatrove.DocumentTokenizer(str(target), str(folder / "tokenizer.json"), **options).run(documents)
    return target


def same(found, expected):
    return len(found) == len(expected) and all(np.array_equal(one, other) for one, other in zip(found, expected))


def all_documents(store, split="train"):
    return [store.split(split).document(number) for number in range(store.split(split).document_count)]


def test_a_store_is_made_of_files_of_both(megatron, datatrove, folder, documents, tmp_path):
    write_megatron(megatron, tmp_path / "web.v1_text_document", documents[:50])
    write_megatron(megatron, tmp_path / "held_out", documents[50:60])
    write_datatrove(datatrove, tmp_path / "books", folder, TEXTS[60:])
    sources = [
        ForeignSource("web", [tmp_path / "web.v1_text_document"], [tmp_path / "held_out.bin"], weight=3.0),
        ForeignSource("books", [tmp_path / "books"]),
    ]
    store = import_store(sources, folder, tmp_path / "store")

    assert same(all_documents(store), [*documents[:50], *documents[60:]])
    assert same(all_documents(store, "validation"), documents[50:60])
    counts = verify_store(store.path)
    assert counts["documents"] == 120 and counts["tokens"] == sum(map(len, documents))
    assert inspect_document(store, "train", 50) == TEXTS[60]
    web, books = store_stats(store)["train"]["sources"].values()
    assert (web["share"], books["share"]) == (0.75, 0.25)
    assert web["bytes"] == sum(len(text.encode()) for text in TEXTS[:50])
    assert (store.path / "train-00000.bin").samefile(tmp_path / "web.v1_text_document.bin")  # no copy
    assert (store.path / "train-00001.bin").samefile(tmp_path / "books" / "00000_unshuffled.ds")


def test_what_was_imported_is_trained_on(megatron, folder, documents, tmp_path):
    write_megatron(megatron, tmp_path / "one", documents)
    store = import_store([ForeignSource("web", [tmp_path / "one"])], folder, tmp_path / "store", validation=0.1)
    samples = Samples([Phase(0, [StoreEntry(store.path)], sequence_length=32)], mtp_depth=0, seed=0)
    stream = np.concatenate(documents[:108])  # 12 of 120 documents are held out
    windows = {tuple(stream[start : start + 33]) for start in range(0, len(stream) - 32, 32)}
    drawn = {tuple(samples[number][0].tolist()) for number in range(len(windows))}
    assert drawn == windows


@pytest.mark.parametrize("shuffled", [False, True])
def test_datatrove_files_of_four_bytes_are_taken_without_a_copy(
    datatrove, folder, documents, tmp_path, shuffled, monkeypatch
):
    monkeypatch.setattr(datatrove.DocumentTokenizer, "token_size", 4)  # as with a vocabulary above 65,536
    write_datatrove(datatrove, tmp_path / "ds", folder, TEXTS, shuffle_documents=shuffled, seed=0)
    store = import_store([ForeignSource("web", [tmp_path / "ds"])], folder, tmp_path / "store")
    assert store.manifest.dtype == "int32"
    assert (store.path / "train.bin").samefile(next((tmp_path / "ds").glob("*.ds")))
    found = all_documents(store)
    assert same(sorted(map(tuple, found)), sorted(map(tuple, documents)))
    assert same(found, documents) != shuffled


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int16])
def test_any_integer_type_of_megatron_is_taken(megatron, folder, documents, tmp_path, dtype):
    write_megatron(megatron, tmp_path / "one", documents, dtype)
    store = import_store([ForeignSource("web", [tmp_path / "one"])], folder, tmp_path / "store")
    assert store.manifest.dtype == np.dtype(dtype).name
    assert same(all_documents(store), documents)
    verify_store(store.path)


def test_files_of_different_types_are_brought_to_one(megatron, folder, documents, tmp_path):
    paths = [
        write_megatron(megatron, tmp_path / dtype.__name__, documents, dtype)
        for dtype in (np.int64, np.int32, np.uint16)
    ]
    store = import_store([ForeignSource("web", paths)], folder, tmp_path / "store")
    assert store.manifest.dtype == "uint16"
    assert same(all_documents(store), documents * 3)
    assert (store.path / "train-00002.bin").samefile(tmp_path / "uint16.bin")
    verify_store(store.path)


def test_the_sequences_of_a_document_become_one(megatron, folder, documents, tmp_path):
    write_megatron(megatron, tmp_path / "sentences", documents, sentences=3)
    store = import_store([ForeignSource("web", [tmp_path / "sentences"])], folder, tmp_path / "store")
    assert same(all_documents(store), documents)


def test_megatron_reads_our_store(megatron, folder, documents, tmp_path):
    write_indexed(tmp_path / "web", documents, np.dtype(np.uint16))
    store = import_store([ForeignSource("web", [tmp_path / "web"])], folder, tmp_path / "store", validation=0.25)
    prefixes = export_store(store, tmp_path / "out", "megatron")
    assert [prefix.name for prefix in prefixes] == ["train", "validation"]
    for prefix, expected in zip(prefixes, (documents[:90], documents[90:])):
        dataset = megatron.IndexedDataset(str(prefix))
        assert same(list(dataset), expected)
        assert dataset.document_indices.tolist() == list(range(len(expected) + 1))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_datatrove_reads_our_store(datatrove, folder, documents, tmp_path, dtype):
    write_indexed(tmp_path / "web", documents, np.dtype(dtype))
    store = import_store([ForeignSource("web", [tmp_path / "web"])], folder, tmp_path / "store")
    train, _ = export_store(store, tmp_path / "out", "datatrove")
    stream = np.concatenate(documents)
    open_with = partial(datatrove.DatatroveFileDataset, str(train), token_size=np.dtype(dtype).itemsize)
    windows = open_with(15)
    found = np.concatenate([windows[number]["input_ids"].numpy() for number in range(len(windows))])
    assert np.array_equal(found, stream[: len(stream) // 16 * 16])
    positions = np.concatenate([np.arange(len(document)) for document in documents])
    assert open_with(255, return_positions=True)[0]["positions"].tolist() == positions[:256].tolist()
    again = import_store([ForeignSource("web", [train])], folder, tmp_path / "again")
    assert same(all_documents(again), documents)


def refused(folder, tmp_path, match, *paths, **options):
    with pytest.raises(DataError, match=match) as error:
        import_store([ForeignSource("web", paths)], folder, tmp_path / "store", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()


def test_documents_without_an_end_are_refused(megatron, datatrove, folder, documents, tmp_path):
    write_megatron(megatron, tmp_path / "endless", [document[:-1] for document in documents])
    write_datatrove(datatrove, tmp_path / "ds", folder, TEXTS, eos_token=None)
    for path in (tmp_path / "endless", tmp_path / "ds"):
        refused(
            folder, tmp_path, r"document 0 ends with token \d+; every document must end with 1 .* --append-eod", path
        )


def test_what_does_not_fit_is_refused(megatron, datatrove, folder, documents, tmp_path):
    write_megatron(megatron, tmp_path / "other", [np.array([5, 400, END])])
    refused(folder, tmp_path, r"other.bin: token id 400; the tokenizer .* has ids 0 to 399", tmp_path / "other")
    write_datatrove(datatrove, tmp_path / "ds", folder, TEXTS, save_index=False)
    refused(folder, tmp_path, r"00000_unshuffled.ds.index: missing; .* save_index=True", tmp_path / "ds")
    np.array([3, 5], "<u8").tofile(tmp_path / "ds" / "00000_unshuffled.ds.index")
    refused(folder, tmp_path, r"its index says 5 tokens of 2 or 4 bytes", tmp_path / "ds")
    refused(folder, tmp_path, r"nothing.bin: missing|nothing.idx: missing", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    refused(folder, tmp_path, r"empty: holds no .ds and no .bin file", tmp_path / "empty")
    write_megatron(megatron, tmp_path / "good", documents[:2])
    refused(folder, tmp_path, r"validation = 0.9: leaves none of the 2 documents", tmp_path / "good", validation=0.9)
    unfinished = megatron.IndexedDatasetBuilder(str(tmp_path / "unfinished.bin"), np.uint16)
    unfinished.add_item(torch.from_numpy(documents[0]))
    unfinished.finalize(str(tmp_path / "unfinished.idx"))
    refused(folder, tmp_path, r"its documents do not cover its 1 sequences; end each", tmp_path / "unfinished")


@pytest.mark.parametrize("weight", [0, float("nan"), float("inf")])
def test_a_weight_that_gives_no_share_is_refused(tmp_path, weight):
    with pytest.raises(DataError, match=r"source web: weight = \w+: must be a number above 0"):
        import_store([ForeignSource("web", [tmp_path], weight=weight)], tmp_path, tmp_path / "store")


def test_a_folder_in_use_is_left_alone(megatron, folder, documents, tmp_path):
    write_megatron(megatron, tmp_path / "web", documents)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"is not an empty folder; give a new one"):
        import_store([ForeignSource("web", [tmp_path / "web"])], folder, tmp_path / "store")
    assert (tmp_path / "store" / "notes.txt").read_text() == "mine"

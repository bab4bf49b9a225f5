"""Preparation: the same store from any number of workers and tasks, however often it is interrupted; care with what is there."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest

import data.prepare
from data.counts import Count
from data.dedup.signatures import Dedup
from data.documents import Rejected, text_hash
from data.errors import DataError
from data.prepare import STAGING, prepare, train_tokenizer
from data.prepare.encode import in_validation_split
from data.prepare.work import Share, Work
from data.progress import Progress
from data.recipe import DataRecipe, Given
from data.report.shape import Report
from data.store import Store, inspect_document, verify_store
from data.tokenizer import fingerprint
from tests.conftest import write_tiny_recipe
from tests.processes import PROCESSES
from train.cli import main

KILLS = 20


def content(store):
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


@pytest.fixture
def recipe(tmp_path):
    return small_recipe(tmp_path)


def small_recipe(folder):
    """Many small shards and files, and every kind of stage."""
    tiny = write_tiny_recipe(folder, documents=120, vocab_size=400).model_dump(mode="json")
    tiny |= {"shard_bytes": 16_000, "tokens_per_file": 3_000, "fim_rate": 0.2, "split_joined_rate": 0.2}
    tiny["dedup"] = {"exact": True, "minhash": {}}
    tiny["steps"] = [{"kind": "normalise"}, {"kind": "pii"}]
    return DataRecipe.model_validate(tiny)


class Once(NamedTuple):
    """A store that one process made undisturbed."""

    recipe: DataRecipe
    store: Store
    seconds: float


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("once")
    recipe = small_recipe(folder)
    process = PROCESSES.Process(target=prepare, args=(recipe, folder / "store", 1))
    process.start()
    started = time.monotonic()  # the tests' server is there
    process.join()
    seconds = time.monotonic() - started
    return Once(recipe, Store.open(folder / "store"), seconds)


def test_the_store_does_not_depend_on_the_number_of_workers(once, tmp_path):
    one = once.store
    assert len(one.manifest.splits["train"].pieces) > 3
    assert content(prepare(once.recipe, tmp_path / "two", workers=2).path) == content(one.path)
    assert not (one.path / STAGING).exists()
    verify_store(one.path)


def test_tasks_share_the_work_and_make_the_same_store(once, tmp_path):
    shares = [Share(1, 3), Share(2, 3), Share()]  # the last is somebody who is impatient
    spelt = [tmp_path / "three", tmp_path / "three", tmp_path / "killed" / ".." / "three"]
    (tmp_path / "killed").mkdir()
    tasks = [PROCESSES.Process(target=prepare, args=(once.recipe, out, 1, share)) for out, share in zip(spelt, shares)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(60)
        assert task.exitcode == 0
    assert content(tmp_path / "three") == content(once.store.path)


def test_a_preparation_killed_twenty_times_makes_the_same_store(once, tmp_path):
    recipe, expected = once.recipe, content(once.store.path)
    pick, killed = random.Random(0), 0
    out = tmp_path / "killed"
    while killed < KILLS:
        process = PROCESSES.Process(target=prepare, args=(recipe, out))
        process.start()
        process.join(pick.uniform(0, once.seconds / 4))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert process.exitcode == -signal.SIGKILL or (out / "manifest.json").exists()
        if (out / "manifest.json").exists():
            assert content(out) == expected
            out = tmp_path / f"killed-{killed}"
    assert content(prepare(recipe, out).path) == expected


def test_a_full_disk_is_one_line_and_what_was_finished_is_kept(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(), encoding="utf-8")  # JSON is YAML
    out = tmp_path / "store"
    process = PROCESSES.Process(target=run_with_small_files, args=(tmp_path / "recipe.yaml", out, tmp_path / "said"))
    process.start()
    process.join(60)
    assert process.exitcode == 2
    said = (tmp_path / "said").read_text()
    assert "File too large" in said and "Traceback" not in said
    assert any((out / STAGING).rglob("*.json"))
    assert content(prepare(tmp_path / "recipe.yaml", out).path) == content(
        prepare(tmp_path / "recipe.yaml", tmp_path / "whole").path
    )


def run_with_small_files(recipe, out, said):
    """The command, where no file may be larger than 8 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
        os._exit(main(["data", "prepare", str(recipe), "--out", str(out), "--workers", "1"]))


def test_two_runs_do_not_write_one_folder(recipe, tmp_path):
    with (
        Work(tmp_path / "store" / STAGING, 1, Share(), Progress()),
        pytest.raises(
            DataError, match=rf"--out = .*store: process {os.getpid()} on .* is preparing it; wait for it, or give"
        ),
    ):
        prepare(recipe, tmp_path / "store")


def test_what_was_begun_is_not_finished_with_something_else(recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("data.prepare.encode.encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(recipe, tmp_path / "store")
    with pytest.raises(
        DataError, match=r"unfinished store of another recipe \(steps differs\); delete .*\.preparing to begin again"
    ):
        prepare(recipe.model_copy(update={"steps": recipe.steps[:1]}), tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr("data.prepare.beginning.versions", lambda: {"tokenizers": "0.1"})
        with pytest.raises(DataError, match=r"was begun with tokenizers \d.*, here is 0.1; install that one"):
            prepare(recipe, tmp_path / "store")
    with (tmp_path / "verse.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"verse.jsonl: changed since the store in .* was begun"):
        prepare(recipe, tmp_path / "store")


def test_a_mistake_in_a_late_stage_is_mended_without_reading_again(recipe, tmp_path):
    store = tmp_path / "store"
    wrong = recipe.model_copy(update={"tokenizer": recipe.tokenizer.model_copy(update={"vocab_size": 60_000})})
    with pytest.raises(DataError, match=r"tokenizer.vocab_size = 60000: the text yields only"):
        prepare(wrong, store)
    early = {path: path.stat().st_mtime_ns for path in (store / STAGING / "clean").rglob("*.json")}
    assert early
    changes = {
        "fim_rate": 0.5,
        "seed": 3,
        "sources": [source.model_copy(update={"weight": 1}) for source in recipe.sources],
    }
    mended = recipe.model_copy(update=changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.prepare.write.write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(mended, store)
    assert {path: path.stat().st_mtime_ns for path in early} == early
    assert content(prepare(mended, store).path) == content(prepare(mended, tmp_path / "fresh").path)


def test_what_is_missing_is_said_before_anything_is_read(recipe, tmp_path):
    given = recipe.model_dump(mode="json")
    for changes, message in [
        (
            {"reference_tokenizer": "nowhere"},
            r"reference_tokenizer = nowhere: no such folder; give the folder of a Hugging",
        ),
        ({"tokenizer": {"kind": "folder", "path": str(tmp_path)}}, r"tokenizer.path = .*: has no tokenizer.json"),
        ({"steps": [{"kind": "custom", "step": "no_such_module:Step"}]}, r"no_such_module"),
    ]:
        with pytest.raises(DataError, match=message):
            prepare(DataRecipe.model_validate(given | changes), tmp_path / "store")
        assert not (tmp_path / "store" / STAGING / "read").exists()
        shutil.rmtree(tmp_path / "store")


def test_a_stop_between_any_two_renames_of_the_end_loses_nothing(recipe, tmp_path):
    expected = content(prepare(recipe, tmp_path / "whole").path)
    store, stops = tmp_path / "store", 0
    while not (store / "manifest.json").exists():
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr("data.prepare.Path.replace", stop_after(1, Path.replace))  # each start moves one piece more
            prepare(recipe, store)
        stops += 1
    assert stops > 5
    assert content(store) == expected


def stop_after(calls, function):
    """The function, which is interrupted instead of being called once more."""
    left = iter(range(calls))

    def limited(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    return limited


def test_what_an_abandoned_preparation_has_left_does_not_get_into_another(recipe, tmp_path):
    store = tmp_path / "store"
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr("data.prepare.Manifest.write", stop_after(0, None))
        prepare(recipe, store)
    assert (store / "train-00000.bin").exists() and not (store / "manifest.json").exists()
    shutil.rmtree(store / STAGING)
    other = recipe.model_copy(update={"seed": 1, "tokens_per_file": 9_000})
    assert content(prepare(other, store).path) == content(prepare(other, tmp_path / "fresh").path)


def test_many_shards_need_few_open_files(recipe, tmp_path):
    many = recipe.model_copy(update={"shard_bytes": 1_000, "dedup": Dedup()})
    process = PROCESSES.Process(target=prepare_with_few_files, args=(many, tmp_path / "store"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert len(list((tmp_path / "locks").iterdir())) > 3 * FEW_FILES


FEW_FILES = 40


def prepare_with_few_files(recipe, out):
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    data.prepare.write.OPEN_FILES = 8
    data.prepare.remove_if_unused = lambda folder: (folder / "locks").rename(out.parent / "locks")
    prepare(recipe, out)


def test_steps_in_another_order_are_counted_apart(recipe, tmp_path):
    some = {"kind": "custom", "step": "tests.data.test_prepare:OnlyWords", "options": {"letters": 150}}
    orders = [[some, {"kind": "normalise"}], [{"kind": "normalise"}, some]]
    given = recipe.model_dump(mode="json")
    given["sources"] = [source | {"steps": steps} for source, steps in zip(given["sources"], orders)]
    store = prepare(DataRecipe.model_validate(given), tmp_path / "store")
    report = Report.read(store.path)
    assert [stage.name for stage in report.stages] == [
        *("read", "custom", "normalise", "custom"),
        *("exact duplicates", "near duplicates"),
    ]
    for source in ("verse", "code"):
        left = [stage.sources[source].documents for stage in report.stages if source in stage.sources]
        assert left == sorted(left, reverse=True) and left[0] > left[2]
        assert left[-1] == sum(tokens.documents for tokens in report.tokens[source].values())


def test_a_source_of_which_nothing_is_left_is_named(recipe, tmp_path):
    given = recipe.model_dump(mode="json")
    given["sources"].append(given["sources"][0] | {"name": "again"})
    with pytest.raises(
        DataError, match=r"source again: no document is left after its steps and the removal of duplicates"
    ):
        prepare(DataRecipe.model_validate(given), tmp_path / "store")
    with pytest.raises(DataError, match=r"source verse: all its documents fell to validation; add documents or lower"):
        prepare(
            recipe.model_copy(update={"validation": 1 - 1e-9, "tokenizer": given_tokenizer(recipe, tmp_path)}),
            tmp_path / "v",
        )


def given_tokenizer(recipe, tmp_path):
    return Given(kind="folder", path=train_tokenizer(recipe, tmp_path / "tokenizer"))


def test_every_document_is_counted_where_it_fell(recipe, tmp_path):
    """Written: 120 poems, one of them twice and one almost twice, a page of marks, a line that is no JSON; 120 functions."""
    lines = (tmp_path / "verse.jsonl").read_text().splitlines()
    longest = max((json.loads(line)["text"] for line in lines), key=len)
    almost = longest + "one more line of verse\n"
    added = [lines[0], json.dumps({"text": almost}), json.dumps({"text": "* * *\n" * 50}), '{"text": ']
    (tmp_path / "verse.jsonl").write_text("\n".join(lines + added) + "\n")
    steps = [{"kind": "custom", "step": "tests.data.test_prepare:OnlyWords", "options": {"letters": 10}}]
    sources = recipe.model_dump(mode="json")["sources"]
    given = recipe.model_dump(mode="json") | {"steps": steps, "sources": [sources[0] | {"priority": 1}, sources[1]]}
    report = Report.read(prepare(DataRecipe.model_validate(given), tmp_path / "store").path)
    stages = {stage.name: stage.sources["verse"].documents for stage in report.stages}
    assert stages["read"] == 123 and stages["custom"] == 122
    assert report.unreadable["verse"].reasons == {"not_json": 1}
    assert report.rejected["verse"]["custom"]["few_letters"] == Count(documents=1, bytes=300)
    assert [(e.step, e.reason, e.text[:5]) for e in report.examples] == [("custom", "few_letters", "* * *")]
    removed = report.duplicates.removed["verse"]
    assert removed["exact"].documents >= 1 and removed["near"].documents >= 1
    assert stages["near duplicates"] == 122 - removed["exact"].documents - removed["near"].documents
    kept = sum(count.documents for count in report.tokens["verse"].values())
    assert kept == stages["near duplicates"]
    assert report.languages["verse"] == {"unknown": report.stages[1].sources["verse"]}
    assert sum(report.lengths["verse"].values()) == 122 and sum(report.token_lengths["verse"].values()) == kept


class OnlyWords:
    def __init__(self, letters):
        self.letters = letters

    def apply(self, document):
        return document if sum(map(str.isalpha, document.text)) >= self.letters else Rejected("few_letters")


def test_a_step_that_fails_is_named_with_its_document(recipe, tmp_path):
    steps = [{"kind": "custom", "step": "tests.data.test_prepare:Fails"}]
    given = recipe.model_dump(mode="json") | {"steps": steps}
    with pytest.raises(
        DataError, match=r"step custom fails on .*verse.jsonl:1 \(KeyError: 'no such key'\); mend the step"
    ):
        prepare(DataRecipe.model_validate(given), tmp_path / "store")


class Fails:
    def apply(self, document):
        raise KeyError("no such key")


def test_every_document_is_in_one_split_chosen_by_its_text(tiny_store):
    seen = {split: set() for split in ("train", "validation")}
    for split in seen:
        for number in range(tiny_store.manifest.splits[split].documents):
            text = inspect_document(tiny_store, split, number)
            assert in_validation_split(text_hash(text), 0.1) == (split == "validation")
            seen[split].add(text)
    assert seen["validation"] and not seen["train"] & seen["validation"]
    written = (tiny_store.path.parent / "code.txt").read_text().split("\f")
    assert set(written) <= seen["train"] | seen["validation"]


def test_documents_are_shuffled_within_their_source(tiny_store):
    written = (tiny_store.path.parent / "verse.jsonl").read_text().splitlines()
    train = [
        text for text in (json.loads(line)["text"] for line in written) if not in_validation_split(text_hash(text), 0.1)
    ]
    stored = [inspect_document(tiny_store, "train", number) for number in range(len(train))]
    assert sorted(stored) == sorted(train)
    assert sum(a == b for a, b in zip(stored, train)) < len(train) / 5


def test_a_finished_store_is_kept_and_another_recipe_is_refused(tmp_path, capsys):
    recipe = write_tiny_recipe(tmp_path, documents=60, vocab_size=400)
    before = content(prepare(recipe, tmp_path / "store").path)
    capsys.readouterr()
    prepare(recipe, tmp_path / "store")
    assert "already holds the store of this recipe" in capsys.readouterr().err
    assert content(tmp_path / "store") == before
    with pytest.raises(DataError, match="holds the store of another recipe; give another folder, or delete this one"):
        prepare(recipe.model_copy(update={"seed": 1}), tmp_path / "store")


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    recipe = write_tiny_recipe(tmp_path, documents=60, vocab_size=400)
    with pytest.raises(DataError, match=r"holds code.txt, which is no part of a store; give an empty or new folder"):
        prepare(recipe, tmp_path)
    with pytest.raises(DataError, match=r"workers = 0: must be at least 1"):
        prepare(recipe, tmp_path / "store", workers=0)


@pytest.mark.parametrize("kind", ["folder", "sentencepiece"])
def test_a_store_takes_any_kind_of_tokenizer(tiny_store, tmp_path, kind):
    recipe = write_tiny_recipe(tmp_path, documents=100).model_dump(mode="json")
    given = {"kind": "folder", "path": str(tiny_store.tokenizer_folder)}
    recipe["tokenizer"] = given if kind == "folder" else {"kind": kind, "vocab_size": 420}
    store = prepare(DataRecipe.model_validate(recipe), tmp_path / "store")
    assert (store.manifest.tokenizer_fingerprint == tiny_store.manifest.tokenizer_fingerprint) == (kind == "folder")
    verify_store(store.path)
    assert inspect_document(store, "train", 0).endswith("\n")
    for split, record in store.manifest.splits.items():
        assert store.token_bytes()[store.split(split).read(0, record.tokens)].sum() == sum(
            span.bytes for span in record.sources
        )


def test_the_tokenizer_alone_is_the_one_of_the_store(tmp_path):
    recipe = write_tiny_recipe(tmp_path, documents=60, vocab_size=400)
    folder = train_tokenizer(recipe, tmp_path / "tokenizer")
    store = prepare(recipe, tmp_path / "store")
    assert fingerprint(folder) == store.manifest.tokenizer_fingerprint
    with pytest.raises(DataError, match="is not empty; give a new folder"):
        train_tokenizer(recipe, folder)


def test_a_source_without_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    source = {"name": "nothing", "kind": "text", "path": str(tmp_path / "empty.txt")}
    recipe = write_tiny_recipe(tmp_path, documents=60, vocab_size=400).model_dump(mode="json")
    recipe["sources"].append(source)
    with pytest.raises(DataError, match="source nothing: has no documents with text"):
        prepare(DataRecipe.model_validate(recipe), tmp_path / "store")


def test_the_share_of_validation_is_the_one_asked_for():
    share = sum(in_validation_split(text_hash(f"text {n}"), 0.1) for n in range(5000)) / 5000
    assert share == pytest.approx(0.1, abs=0.015)  # 3.5 standard deviations

"""The data of a run is known by its content, not by where it lies."""

import shutil
from pathlib import Path

import pytest

from data.store import Store
from tests.small_run import CHANGES
from train.config import load_recipe
from train.corpus import Corpus


def fingerprint(store: Path, *changes: str) -> str:
    settings = [f"{key}={value}" for key, value in (CHANGES | {"data.train": store}).items()]
    return Corpus(load_recipe("tiny", [*settings, *changes]), total_samples=8).fingerprint


def test_a_store_that_has_moved_is_the_same_data(tiny_store: Store, tmp_path: Path) -> None:
    shutil.copytree(tiny_store.path, tmp_path / "moved")
    assert fingerprint(tmp_path / "moved", "run.seed=3") == fingerprint(tiny_store.path)


@pytest.mark.parametrize("change", ["data.seed=1", "data.sequence_length=16", "data.mask_documents=true"])
def test_what_changes_the_samples_changes_the_fingerprint(tiny_store: Store, change: str) -> None:
    assert fingerprint(tiny_store.path, change) != fingerprint(tiny_store.path)


def test_other_text_in_the_same_place_is_other_data(tiny_store: Store, tmp_path: Path) -> None:
    """The manifest's hash of train.bin is what tells."""
    shutil.copytree(tiny_store.path, tmp_path / "other")
    manifest = tmp_path / "other" / "manifest.json"
    known = tiny_store.manifest.files["train.bin"].sha256
    manifest.write_text(manifest.read_text().replace(known, "0" * 64))
    assert fingerprint(tmp_path / "other") != fingerprint(tiny_store.path)

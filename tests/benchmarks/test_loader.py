"""The loader's benchmark compares like with like, and runs as benchmarks/README.md says."""

import json

import numpy as np
import pytest

from tests.benchmarks.commands import command, run

pytest.importorskip("megatron.core")


def test_both_sides_read_the_same_windows_and_the_report_is_whole(tmp_path):
    from benchmarks.loader import LENGTHS, MegatronWindows, make_store, samples_of

    store = make_store(tmp_path / "store", 100_000)
    theirs = MegatronWindows(store.path / "train", 512)
    samples = samples_of(store, 512, "concat")
    expected = {tuple(np.concatenate(theirs[i])) for i in range(len(theirs))}
    batch = samples.batch(0, len(theirs))
    assert expected == {tuple(np.concatenate(row)) for row in zip(batch.tokens.numpy(), batch.documents.numpy())}

    small = ("--tokens", "4e5", "--seconds", "0.01", "--turns", "1")
    run(command("loader.py", {"--json": str(tmp_path / "loader.json")}, *small), tmp_path)
    result = json.loads((tmp_path / "loader.json").read_text())
    assert {(entry["sequence_length"], entry["workers"]) for entry in result["readers"]} == {
        (length, workers) for length in LENGTHS for workers in (1, 2)
    }
    for entry in result["readers"]:
        assert entry["tokens_per_second"].keys() == {"concat", "best_fit", "torch"}
    for length in LENGTHS:
        assert result["packing"][str(length)]["best_fit"]["cut_needlessly"] == 0

"""A byte of the token store that has changed ends a run on all its ranks before the step that would read it."""

import shutil
from pathlib import Path

import pytest

from data.checked import BLOCK
from data.errors import DataError
from data.samples import Phase, Samples, StoreEntry, empty_batch
from data.store import Store
from tests.small_run import LENGTH, SEQUENCES, Run
from train.cli import main


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def first_reader(store: Path, ranks: int) -> tuple[int, list[int]]:
    """The step of a run on so many ranks at which a damage is met, and by which of them."""
    samples = Samples([Phase(0, [StoreEntry(store)], LENGTH)], 1, seed=0)
    share = SEQUENCES // ranks
    for step in range(5):
        met = []
        for rank in range(ranks):
            batch = empty_batch(share, LENGTH + 2)
            try:
                samples.fill(step * SEQUENCES + rank * share, batch.tokens.numpy(), batch.documents.numpy())
            except DataError:
                met.append(rank)
        if met:
            return step, met
    return 5, []


@pytest.mark.parametrize("workers", [0, 2])
def test_what_one_rank_finds_damaged_ends_all_before_the_step_that_would_read_it(
    tiny_store: Store, tmp_path: Path, workers: int
) -> None:
    store = shutil.copytree(tiny_store.path, tmp_path / "store")
    tokens = store / "train.bin"
    for block in range(tokens.stat().st_size // BLOCK):
        flip(tokens, byte := block * BLOCK)
        step, ranks = first_reader(store, 2)
        if step and ranks == [1]:
            break
        flip(tokens, byte)
    assert ranks == [1]
    run = Run(store, tmp_path / "run")
    changes = ("checkpoint.every_steps=1", f"data.workers={workers}")
    assert run.train(*changes, processes=2) == [2, 2]
    assert "Traceback" not in run.said
    (line,) = [line for line in run.said.splitlines() if line.startswith("rorqual: ")]
    assert line.startswith("rorqual: source ") and line.endswith("or copy the file again")
    assert f"{tokens}: bytes {byte:,} to {byte + BLOCK:,} are not what was written" in line
    assert run.checkpoints()[-1] == f"step-{step:08d}"
    flip(tokens, byte)
    assert run.train(*changes, processes=2) == [0, 0], run.said
    assert f"continuing after step {step} of 20" in run.said


def test_damaged_text_is_not_evaluated_nor_shown(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = shutil.copytree(whole.store, tmp_path / "store")
    flip(store / "validation.bin", 10)
    for command in (
        ["evaluate", str(whole.folder), "--data", str(store)],
        ["data", "inspect", str(store), "--document", "0", "--split", "validation"],
        ["data", "verify", str(store)],
    ):
        assert main(command) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and f"{store}/validation.bin: " in said.err

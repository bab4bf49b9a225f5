"""A user's mistake is one line with field, value, rule and fix, and exit code 2; nothing that was there is lost."""

import fcntl
import importlib.util
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from data.store import Store
from model.ops.grouped_mm import examine
from tests.small_run import Run, assert_same_bits
from train import assemble, runlog
from train.cli import main

Refuse = Callable[..., str]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """refuse(*arguments): run the command line in this process; it must end with exit code 2 and one line, which is returned."""

    def run(*arguments: object) -> str:
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert code == 2, said.err
        assert said.out == ""
        return one_line(said.err)

    return run


@pytest.fixture(scope="module")
def stopped(whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has ended at step 8. It is not to be changed."""
    run = Run(whole.store, tmp_path_factory.mktemp("stopped") / "run")
    assert run.train("checkpoint.every_steps=4", "run.stop_at_step=8") == [0], run.said
    return run


@pytest.fixture
def half(stopped: Run, tmp_path: Path) -> Iterator[Run]:
    """A run with checkpoints at steps 4 and 8, which no mistake may touch."""
    run = Run(stopped.store, tmp_path / "half")
    shutil.copytree(stopped.folder, run.folder)
    before = content(run)
    yield run
    assert content(run) == before


def one_line(text: str) -> str:
    assert text.startswith("rorqual: ") and text.endswith("\n") and text.count("\n") == 1, text
    return text.removeprefix("rorqual: ").rstrip("\n")


def content(run: Run) -> dict[str, bytes]:
    kept = [run.folder / "metrics.jsonl", *(run.folder / "checkpoints").rglob("*")]
    return {str(path.relative_to(run.folder)): path.read_bytes() for path in kept if path.is_file()}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("schedule.warmup=3", "schedule.warmup = 3: unknown key; did you mean schedule.warmup_steps?"),
        ("schedule.tokens=many", "schedule.tokens = 'many': must be a whole number, at least 1; write it like 100, 1_000 or 1e7"),
        ("schedule={lr: auto, tokens: 1e3, batch_tokens: 32, law: a}", "schedule.law = 'a': must be a file or one of"),
        ("parallel.pipeline=2", "parallel.pipeline = 2: does not divide 1 process; use parallel.pipeline=1 or 2 processes"),
        ("parallel.schedule=gpipe", "parallel.schedule = 'gpipe': must be '1f1b', 'interleaved', 'zbv' or 'dualpipev'; "),
        ("parallel.expert=2", "parallel.expert = 2: fsdp, zero1 and zero2 spread experts, ddp does not; use parallel.expert=1"),
        ("parallel.deepspeed=ds.json", "parallel.deepspeed = 'ds.json': cannot be read (No such file or directory); give"),
        ("model.hidden_size=0", "hidden_size"),
        ("data.sequence_length=128", "data.sequence_length = 128: is more than model.max_position_embeddings = 64; lower it"),
        ("schedule.batch_tokens=100", "schedule.batch_tokens = 100: 100 is not a multiple of data.sequence_length = 32; write"),
        ("model.vocab_size=500", "model.vocab_size = 500: the tokenizer of"),
        ("data.train=nowhere", "nowhere: no such folder; a token store is needed; make one with `rorqual data prepare"),
        ("run.initialize_from=nowhere", "weights nowhere: no such folder; give a run folder, a checkpoint"),
        ("run.attention=flex", "run.attention = flex: runs on a GPU only; leave it at auto"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_recipe_is_one_line(run: Run, refuse: Refuse, change: str, line: str) -> None:
    assert line in refuse("train", *run.arguments(change))
    assert not run.folder.exists()


def test_a_width_that_a_gpu_cannot_multiply_is_one_line(
    run: Run, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is tried on the device. Here it is a CPU that is taken for a GPU."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(assemble, "examine_experts", lambda config, dtype, device: examine(config, dtype, gpu))
    monkeypatch.setattr(assemble, "choose_attention", lambda *_: pytest.fail("attention was tried before"))
    line = refuse("train", *run.arguments("model.moe_intermediate_size=18"))
    assert "model.moe_intermediate_size: 18 is no multiple of 4" in line and line.endswith("write 20")


def test_a_key_given_twice_is_one_line(run: Run, refuse: Refuse, tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("run: {dir: a}\nschedule: {lr: 1e-3, lr: 2e-3}\n")
    assert "lr" in (line := refuse("train", path)) and str(path) in line, line


@pytest.mark.parametrize("file", ["train.bin", "validation.idx", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_store_is_one_line(run: Run, refuse: Refuse, tmp_path: Path, file: str, damage: str) -> None:
    store = tmp_path / "store"
    shutil.copytree(run.store, store)
    damaged = store / file
    if damage == "missing":
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[:-6])
    line = refuse("train", *run.arguments(f"data.train={store}"))
    assert line.startswith(f"{damaged}: ") and "prepare the store again, or copy the file again" in line
    assert not run.folder.exists()


def test_validation_text_is_looked_for_before_the_first_step(run: Run, refuse: Refuse) -> None:
    long = ("model.max_position_embeddings=4096", "data.sequence_length=4096", "schedule.batch_tokens=8192")
    line = refuse("train", *run.arguments(*long))
    assert line.startswith("data.validation: no source of ") and "lower data.sequence_length" in line


def test_a_batch_that_the_processes_cannot_share_is_said_once(run: Run) -> None:
    assert run.train(processes=3) == [2, 2, 2]
    line = one_line(run.said)
    assert line.startswith("schedule.batch_tokens: a global batch of 8 sequences does not divide over 3 processes")
    assert not run.folder.exists()


def test_a_run_folder_that_cannot_be_written_is_said_once_and_ends_all_ranks(run: Run) -> None:
    run.folder.write_text("a file where the folder should be")
    assert run.train(processes=2) == [2, 2]
    line = one_line(run.said)
    assert line.startswith(f"run.dir = {run.folder}: ") and "set another run.dir" in line
    assert run.folder.read_text() == "a file where the folder should be"


def test_another_model_in_the_same_folder_is_refused(half: Run, refuse: Refuse) -> None:
    line = refuse("train", *half.arguments("model.hidden_size=16"))
    assert line.startswith(f"checkpoint {half.checkpoint(8)}: ")
    assert "has shape [512, 32], the run's has [512, 16]" in line and line.endswith("or set another run.dir")


def test_a_folder_that_another_run_works_in_is_refused(
    half: Run, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog, "HANDOVER", 0.2)
    holder = f"{socket.gethostname()} {os.getpid()}"
    with (half.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        print(holder, file=file, flush=True)
        line = refuse("train", *half.arguments())
    at_work = (
        f"run.dir = {half.folder}: another run is at work in it, process {os.getpid()} on {socket.gethostname()}; "
    )
    assert line.startswith(at_work) and "torchrun" in line
    assert (half.folder / ".lock").read_text() == f"{holder}\n"


def test_text_of_another_tokenizer_is_refused_by_a_run(half: Run, refuse: Refuse, tmp_path: Path) -> None:
    shutil.copytree(half.store, tmp_path / "other")
    manifest = Store.open(half.store).manifest.model_copy(update={"tokenizer_fingerprint": "0" * 64})
    manifest.write(tmp_path / "other")
    line = refuse("train", *half.arguments(f"data.train={tmp_path / 'other'}"))
    assert "its tokenizer is not the one that" in line and "set another run.dir" in line


def test_another_length_in_the_same_folder_is_refused(half: Run, refuse: Refuse) -> None:
    line = refuse("train", *half.arguments("data.sequence_length=64"))
    assert line == (
        f"data.sequence_length = 64: the run in {half.folder} has consumed 2,048 tokens, drawn with 32; what has begun stays; "
        "set it back, and let the change begin here with data.stages=[{from_tokens: 2048, sequence_length: …}]"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_one_line(half: Run, refuse: Refuse) -> None:
    assert refuse("train", *half.arguments("run.device=cuda")).startswith("run.device: cuda: this process sees no CUDA")


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_logger_that_is_not_installed_is_said_once_and_ends_all_ranks(half: Run, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    assert half.train(f"logging.{package}=whales", processes=2) == [2, 2]
    assert f"logging.{package} = whales: the package {package} is not installed; run `pip install" in one_line(
        half.said
    )


def test_a_damaged_checkpoint_is_refused_by_every_command(half: Run, refuse: Refuse, tmp_path: Path) -> None:
    damaged = tmp_path / "step-00000008"
    shutil.copytree(half.checkpoint(8), damaged)
    tensors = damaged / "rank-00000.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    for command in (
        ("export", damaged, tmp_path / "out"),
        ("generate", damaged, "--prompt", "The whale"),
        ("evaluate", damaged, "--data", half.store, "--sequence-length", 32),
        ("train", *Run(half.store, tmp_path / "new").arguments(f"run.initialize_from={damaged}")),
    ):
        line = refuse(*command)
        assert line.startswith(f"checkpoint {damaged}: rank-00000.safetensors has ") and "must have" in line, line
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", [b"the", b"{"])
def test_a_tokenizer_that_is_not_the_one_trained_with_is_refused(
    half: Run, refuse: Refuse, tmp_path: Path, damage: bytes
) -> None:
    path = half.folder / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(damage, b"\xc3\x9f", 1))
    line = refuse("export", half.folder, tmp_path / "out")
    assert line.startswith(f"checkpoint {half.checkpoint(8)}: its tokenizer {path.parent} is ")
    assert line.endswith("the one that it was trained with; bring that back")


def test_a_run_steps_over_a_damaged_checkpoint(run: Run, stopped: Run, whole: Run) -> None:
    shutil.copytree(stopped.folder, run.folder)
    (run.checkpoint(8) / "index.json").unlink()
    assert run.train() == [0], run.said
    assert "step-00000008: index.json is missing" in run.said and "skipped" in run.said
    assert "continuing after step 4 of 20" in run.said
    assert_same_bits(run.tensors(), whole.tensors())
    assert run.metrics() == whole.metrics()


def test_a_run_does_not_begin_again_over_damaged_checkpoints(run: Run, refuse: Refuse) -> None:
    assert run.train("checkpoint.every_steps=2", "run.stop_at_step=4") == [0], run.said
    for tensors in run.folder.glob("checkpoints/step-*/*.safetensors"):
        tensors.write_bytes(tensors.read_bytes()[:-1])
    before = content(run)
    line = refuse("train", *run.arguments())
    assert (
        line.startswith(f"run.dir = {run.folder}: none of its 2 checkpoints is whole")
        and "restore a checkpoint" in line
    )
    assert content(run) == before

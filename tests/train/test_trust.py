"""Nothing is unpickled from a file: not by a run that goes on, export, evaluation, generation, import or a start from weights."""

import os
import pickle
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from tests.small_run import Run
from train.cli import main

PLANTED = (
    ".metadata",
    "__0_0.distcp",
    "rank-00001.safetensors",
    "pytorch_model.bin",
    "state.pt",
    "optimizer.pkl",
    "a.npy",
)


class Payload:
    """Whoever unpickles it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def without_pickle(_: list[str], commands: list[list[str]], planted: list[Path]) -> int:
    """Run commands in this process, in which unpickling is an error, and so is to open one of the planted files."""

    def refuse(*arguments: Any, **_: Any) -> NoReturn:
        raise AssertionError(f"something is unpickled: {arguments}")

    class Refusing:
        __init__ = refuse

    pickle.load = pickle.loads = refuse
    pickle.Unpickler = Refusing  # type: ignore[misc, assignment]
    torch.load = torch.serialization.load = refuse
    names = {str(path) for path in planted}
    opened: list[str] = []
    sys.addaudithook(lambda event, arguments: opened.append(arguments[0]) if event == "open" else None)
    codes = [main(command) for command in commands]
    assert not names & {os.path.abspath(path) for path in opened if isinstance(path, str)}
    assert any(path.endswith("rank-00000.safetensors") for path in map(str, opened)), "the hook sees what is opened"
    return max(codes)


def test_a_planted_pickle_is_never_opened_and_nothing_else_is_unpickled(run: Run, tmp_path: Path) -> None:
    assert run.train("run.stop_at_step=4") == [0], run.said
    checkpoint, export, mark = run.checkpoint(4), tmp_path / "export", tmp_path / "mark"
    assert main(["export", str(checkpoint), str(export), "--mtp"]) == 0
    planted = [
        folder / name for folder in (checkpoint, run.folder, run.folder / "tokenizer", export) for name in PLANTED
    ]
    for path in planted:
        path.write_bytes(pickle.dumps(Payload(mark)))
    one_step = ("run.stop_at_step=1", "evaluate.tokens=64")
    commands = [
        ["train", *run.arguments("run.stop_at_step=5")],
        ["export", str(checkpoint), str(tmp_path / "again")],
        ["evaluate", str(run.folder), "--data", str(run.store), "--sequence-length", "32"],
        ["generate", str(export), "--prompt", "the whale", "--max-new-tokens", "1"],
        ["import", str(export), str(tmp_path / "imported")],
        [
            "train",
            *Run(run.store, tmp_path / "other").arguments(f"run.initialize_from={tmp_path / 'imported'}", *one_step),
        ],
    ]
    codes = run.start(work=without_pickle, extra=(commands, planted)).wait(120)
    assert codes == [0], run.said
    assert not mark.exists()
    assert run.checkpoints() == ["step-00000004", "step-00000005"]
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists(), "the planted files would have left a mark"

"""A checkpoint with any byte changed, in any of its files, is found before a value of it is used, in one line."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from train.checkpoint import Checkpoint, CheckpointError, Checkpoints, latest, load
from train.marker import File, VersionError, seal, verify

FILES = ("rank-00000.safetensors", "index.json", "run.json", "COMPLETE")
DAMAGES = 100

Damage = Callable[[Path, random.Random], None]


def flip_a_bit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def flip_a_burst(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    begin = draw.randrange(len(content))
    for place in range(begin, min(begin + draw.randint(2, 512), len(content))):
        content[place] ^= draw.randint(1, 255)
    path.write_bytes(content)


def zero_a_block(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    begin = draw.randrange(len(content))
    end = min(begin + 64, len(content))
    content[begin:end] = bytes(255 if byte == 0 else 0 for byte in content[begin:end])
    path.write_bytes(content)


def cut_off(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def append(path: Path, draw: random.Random) -> None:
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.randint(1, 64)))


def swap_with_another_file(path: Path, draw: random.Random) -> None:
    other = path.with_name(draw.choice([name for name in FILES if name != path.name]))
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def take_that_of_another_step(path: Path, draw: random.Random) -> None:
    """Of the same size, valid in itself: only the hash tells."""
    if path.name == "index.json":  # alike in every step
        flip_a_bit(path, draw)
    else:
        shutil.copyfile(path.parent.with_name("step-00000001") / path.name, path)


def exchange_two_blocks(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    size = len(content) // 4
    first, second = content[:size], content[-size:]
    content[:size], content[-size:] = second, first
    path.write_bytes(content)


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def become_a_folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def become_a_link(path: Path, draw: random.Random) -> None:
    moved = path.parent.parent / path.name
    shutil.move(path, moved)
    path.symlink_to(moved)


KINDS: tuple[Damage, ...] = (
    *(flip_a_bit, flip_a_burst, zero_a_block, cut_off, append, swap_with_another_file),
    *(take_that_of_another_step, exchange_two_blocks, remove, become_a_folder, become_a_link),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Checkpoints of steps 1 and 2, of every dtype that a run saves. They are not to be changed."""
    begun = not dist.is_initialized()
    if begun:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    checkpoints = Checkpoints(tmp_path_factory.mktemp("damage"), asynchronous=False)
    for step in (1, 2):
        checkpoints.save(step, state(step), {"step": step, "recipe": {"run": {"seed": 0}}})
    yield checkpoints.folder
    if begun:
        dist.destroy_process_group()


def state(step: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(step)
    return {
        "parameters": {
            "a.weight": torch.randn(40, 30, generator=draw),
            "experts": torch.randn(4, 6, 5, generator=draw),
        },
        "exp_avg": {"a.weight": torch.randn(40, 30, generator=draw).bfloat16()},
        "steps": torch.tensor(step),
    }


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to / "step-00000002"


def test_a_hundred_damages_are_all_found_and_stepped_over(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every kind of damage to every kind of file, the rest drawn."""
    draw = random.Random(0)
    cases = [(kind, name) for kind in KINDS for name in FILES]
    cases += [(draw.choice(KINDS[:3]), draw.choice(FILES)) for _ in range(DAMAGES - len(cases))]
    for number, (kind, name) in enumerate(cases):
        path = copy(folder, tmp_path / str(number))
        kind(path / name, draw)
        case = f"{kind.__name__} of {name}"
        blank = {"parameters": {"a.weight": torch.full((40, 30), -1.0)}}
        with pytest.raises(CheckpointError) as refused:
            load(path, blank, partial=True)
        line = str(refused.value)
        assert line.startswith(f"checkpoint {path}: ") and "\n" not in line, case
        assert bool((blank["parameters"]["a.weight"] == -1).all()), case
        caplog.clear()
        if refused.type is CheckpointError:  # not a marker that now seems to be a newer version's
            assert latest(path.parent) == path.with_name("step-00000001"), case
            assert [record.message for record in caplog.records] == [f"{line}; skipped"], case
        shutil.rmtree(path.parent)


def test_a_change_in_any_byte_of_the_marker_is_found(folder: Path, tmp_path: Path) -> None:
    path = copy(folder, tmp_path / "marker")
    marker = path / "COMPLETE"
    written = marker.read_bytes()
    draw = random.Random(1)
    for place in range(len(written)):
        changed = bytearray(written)
        changed[place] ^= 1 << draw.randrange(8)
        marker.write_bytes(changed)
        with pytest.raises(CheckpointError) as refused:
            verify(path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ({"step": 2, "files": {"run.json": 5}}, "is of format 1, whose index is a pickle"),
        ({"format": 3}, "was written by rorqual 0.1.0 in format 3"),
        ({"rorqual": "27.0.1"}, "was written by rorqual 27.0.1 in format 2"),
    ],
    ids=["format-1", "format-3", "newer-version"],
)
def test_another_version_s_checkpoint_is_refused_and_neither_stepped_over_nor_replaced(
    folder: Path, tmp_path: Path, marker: dict[str, Any], said: str
) -> None:
    path = copy(folder, tmp_path / "run")
    content = marker if "files" in marker else json.loads((path / "COMPLETE").read_bytes()) | marker
    (path / "COMPLETE").write_text(json.dumps(content))
    before = {file: file.read_bytes() for file in path.iterdir()}
    checkpoints = Checkpoints(path.parent, keep=1, asynchronous=False)
    for refuse in (
        checkpoints.latest,
        lambda: Checkpoint(path),
        lambda: checkpoints.save(2, state(2), {}),
    ):
        with pytest.raises(VersionError, match=said) as refused:
            refuse()
        assert "\n" not in str(refused.value)
    checkpoints.save(3, state(3), {})
    assert {file: file.read_bytes() for file in path.iterdir()} == before


def reseal(path: Path, name: str) -> None:
    """Make the hashes those of the files as they are: what nobody's disk does, but somebody might."""
    seal(path, 2, {name: File.of((path / name).read_bytes()) for name in FILES if name != "COMPLETE"} | {name: ANY})


ANY = File(0, hashlib.sha256().hexdigest())


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../step-00000001/run.json", "tokenizer/../run.json", "", ".", "a\0b"]
)
def test_a_marker_that_leads_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    path = copy(folder, tmp_path / "run")
    reseal(path, name)
    with pytest.raises(
        CheckpointError, match="which leads out of the folder; a checkpoint's files are plain files in it"
    ):
        verify(path)


def test_a_link_on_the_way_to_a_file_is_refused(folder: Path, tmp_path: Path) -> None:
    path = copy(folder, tmp_path / "run")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "empty").touch()
    (path / "tokenizer").symlink_to(outside)
    reseal(path, "tokenizer/empty")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        verify(path)
    (path / "tokenizer").unlink()
    shutil.copytree(outside, path / "tokenizer")
    verify(path)


MATRIX = {"dtype": "F32", "shape": [40, 30]}
NAME, TENSORS = "parameters.a.weight", "rank-00000.safetensors"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({**MATRIX, "parts": [["/etc/passwd", [0, 0], [40, 30]]]}, "'/etc/passwd', which is no file of the checkpoint"),
        ({**MATRIX, "parts": [["../step-00000001/" + TENSORS, [0, 0], [40, 30]]]}, "which is no file of the checkpoint"),
        ({**MATRIX, "parts": [[TENSORS, [0, 0], [39, 30]]]}, "has not all of parameters.a.weight"),
        ({**MATRIX, "parts": [[TENSORS, [10, 0], [40, 30]]]}, r"a part of \[40, 30\] at \[10, 0\]"),
        ({**MATRIX, "parts": [[TENSORS, [0, -1], [40, 30]]]}, "are no sizes"),
        ({**MATRIX, "dtype": "pickle", "parts": []}, "KeyError 'pickle'"),
        ({**MATRIX, "shape": [30, 40], "parts": [[TENSORS, [0, 0], [30, 40]]]}, "not the one that index.json speaks of"),
        ([], "is no index of tensors"),
    ],
)  # fmt: skip
def test_an_index_that_is_not_that_of_its_files_is_refused(folder: Path, tmp_path: Path, entry: Any, said: str) -> None:
    path = copy(folder, tmp_path / "run")
    (path / "index.json").write_text(json.dumps({"tensors": {NAME: entry}}))
    reseal(path, "run.json.empty")
    (path / "run.json.empty").touch()
    shape = entry["shape"] if entry else [40, 30]
    with pytest.raises(CheckpointError, match=said) as refused:
        load(path, {"parameters": {"a.weight": torch.zeros(shape)}})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("file", ["COMPLETE", "index.json"])
def test_json_without_end_is_refused(folder: Path, tmp_path: Path, file: str) -> None:
    path = copy(folder, tmp_path / "run")
    (path / file).write_text("[" * 10**6)
    if file != "COMPLETE":
        reseal(path, "empty")
        (path / "empty").touch()
    with pytest.raises(CheckpointError) as refused:
        load(path, state(2))
    assert "\n" not in str(refused.value)


def test_the_tensors_of_a_rank_are_safetensors_for_every_reader(folder: Path) -> None:
    """torch's own, that of the Hugging Face library, finds names, shapes and offsets in the files alone."""
    path = folder / "step-00000002"
    entries = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    assert {name: tuple(entry.size) for name, entry in entries.items()} == {
        name: stored.shape for name, stored in Checkpoint(path).tensors.items()
    }

"""Damaged files of the data side, by the dozen, with --thorough by the hundred.

What is hashed is always found, the rest is read or refused, all of it in one line.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from data.foreign import export_store
from data.manifest import Manifest
from data.store import Store
from tests.fuzz.files import corrupt
from tests.fuzz.test_recipes import refused
from tests.small_run import Run
from train.export import export
from train.scaling.law import LAWS

CSV = "n,d,lr,loss\n" + "".join(
    f"{n:.3e},{d:.3e},{1e-3 * (n / 1e7) ** -0.2:.3e},{1.7 + 400 / n**0.34 + 410 / d**0.28:.4f}\n"
    for n in (1e7, 3e7, 1e8, 3e8)
    for d in (2e8, 1e9, 5e9)
)

Damage = Callable[[Path, Iterable[str], int], Iterable[str]]


@pytest.fixture(params=[1, pytest.param(10, marks=pytest.mark.slow)])
def damage(request: pytest.FixtureRequest) -> Damage:
    """damage(folder, names, count): so many times one of the folder's files is another one; what was done to it."""

    def run(folder: Path, names: Iterable[str], count: int) -> Iterable[str]:
        files = [folder / name for name in names]
        for number in range(count * request.param):
            draw = random.Random(f"{folder.name}/{number}")
            file = files[number % len(files)]
            before = file.read_bytes()
            what = corrupt(file, draw, [other for other in files if other != file] or [Path(__file__)])
            yield what
            file.write_bytes(before)

    return run


@pytest.fixture(scope="module")
def hf_folder(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in shards with its tokenizer, as `export` writes it."""
    folder = tmp_path_factory.mktemp("fuzzed")
    run = Run(tiny_store, folder / "run")
    assert run.train("run.stop_at_step=1") == [0], run.said
    export(run.folder, folder / "hf", max_shard_bytes=30_000)
    return folder / "hf"


def test_every_damage_of_a_store_is_found(
    tiny_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage
) -> None:
    store = shutil.copytree(tiny_store.path, tmp_path / "store")
    written = Manifest.read(store)
    for what in damage(store, ["manifest.json", *written.files], 22):
        line = refused(["data", "verify", str(store)], capsys)
        if "manifest.json" in what and not line:
            assert Manifest.read(store) == written  # blanks between its values
        else:
            assert line, what
    assert not refused(["data", "verify", str(store)], capsys)


def test_a_damaged_tokenizer_is_used_or_refused_in_one_line(
    tiny_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage
) -> None:
    folder = shutil.copytree(tiny_store.tokenizer_folder, tmp_path / "tokenizer")
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael.\n")
    exported = export_store(tiny_store, tmp_path / "foreign", "megatron")[0]
    for number, _ in enumerate(damage(folder, ["tokenizer.json", "tokenizer_config.json"], 12)):
        if number % 4 < 2:
            refused(["tokenizer", "evaluate", str(folder), "--text", str(text)], capsys)
        else:
            out = tmp_path / f"out-{number}"
            line = refused(["data", "import", f"a={exported}", "--tokenizer", str(folder), "--out", str(out)], capsys)
            assert out.exists() != bool(line)


def test_a_damaged_file_of_another_program_is_imported_or_refused_in_one_line(
    tiny_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage
) -> None:
    for layout in ("megatron", "datatrove"):
        export_store(tiny_store, tmp_path / layout, layout)
    folder = tmp_path / "files"
    folder.mkdir()
    for source in (*(tmp_path / "megatron").glob("train.*"), *(tmp_path / "datatrove").glob("train.ds*")):
        shutil.copyfile(source, folder / source.name)
    for number, what in enumerate(damage(folder, ["train.idx", "train.ds.index", "train.bin", "train.ds"], 8)):
        which = "train.ds" if ".ds" in what else "train"
        command = ["data", "import", f"a={folder / which}", "--tokenizer", str(tiny_store.tokenizer_folder)]
        refused([*command, "--out", str(tmp_path / f"out-{number}")], capsys)


def test_a_damaged_model_folder_is_read_or_refused_in_one_line(
    hf_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage
) -> None:
    folder = shutil.copytree(hf_folder, tmp_path / "hf")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = min(set(index["weight_map"].values()))
    names = ["config.json", "model.safetensors.index.json", shard, "tokenizer.json", "tokenizer_config.json"]
    for number, what in enumerate(damage(folder, names, 15)):
        if "tokenizer" in what:
            refused(["generate", str(folder), "--prompt", "Call", "--max-new-tokens", "2"], capsys)
        else:
            refused(["import", str(folder), str(tmp_path / f"out-{number}")], capsys)


def test_a_damaged_law_or_table_is_read_or_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage
) -> None:
    for name in ("step-law", "ladder-cpu", "chinchilla"):
        shutil.copyfile(LAWS / f"{name}.json", tmp_path / f"{name}.json")
    for what in damage(tmp_path, ["step-law.json", "ladder-cpu.json", "chinchilla.json"], 6):
        law = what.partition(":")[0]
        refused(["scaling", "forecast", str(tmp_path / law), "--flops", "1e21"], capsys)
    (tmp_path / "points.csv").write_text(CSV)
    columns = ["--columns", "params=n,tokens=d,lr=lr,loss=loss", "--draws", "5"]
    with np.errstate(all="ignore"):
        for _ in damage(tmp_path, ["points.csv"], 3):
            refused(["scaling", "fit", "--points", str(tmp_path / "points.csv"), *columns], capsys)


CODE = 'open("{marker}", "w").write("run")\nclass Planted:\n    pass\n'


def test_code_of_a_model_or_tokenizer_folder_is_never_run(
    hf_folder: Path, tiny_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python files beside the weights, and an `auto_map` in both configurations that names them."""
    folder, marker = shutil.copytree(hf_folder, tmp_path / "hf"), tmp_path / "marker"
    for name, keys in {
        "config.json": ("AutoConfig", "AutoModel", "AutoModelForCausalLM"),
        "tokenizer_config.json": ("AutoTokenizer",),
    }.items():
        values = json.loads((folder / name).read_text())
        planted = ["planted.Planted", "planted.Planted"] if name.startswith("tokenizer") else "planted.Planted"
        values |= {"auto_map": dict.fromkeys(keys, planted), "tokenizer_class": "Planted"}
        (folder / name).write_text(json.dumps(values))
    for name in ("planted.py", "modeling_deepseek.py", "__init__.py", "conftest.py", "setup.py"):
        (folder / name).write_text(CODE.format(marker=marker))
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "text.txt").write_text("Call me Ishmael. Some years ago.\n" * 3)
    source = f"{{name: a, kind: text, path: {tmp_path / 'text.txt'}}}"
    recipe.write_text(f"sources: [{source}]\ntokenizer: {{kind: folder, path: {folder}}}\nvalidation: 0\n")
    exported = export_store(tiny_store, tmp_path / "megatron", "megatron")[0]
    for command in (
        ["generate", folder, "--prompt", "Call", "--max-new-tokens", "2"],
        ["evaluate", folder, "--data", tiny_store.path, "--sequence-length", "32", "--tokens", "64"],
        ["import", folder, tmp_path / "imported"],
        ["data", "prepare", recipe, "--out", tmp_path / "prepared", "--workers", "1"],
        ["data", "import", f"a={exported}", "--tokenizer", folder, "--out", tmp_path / "store"],
        ["tokenizer", "evaluate", folder, "--text", tmp_path / "text.txt"],
    ):
        refused([str(part) for part in command], capsys)
        assert not marker.exists(), command


def test_code_of_a_data_set_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with a loading script of its name, as data sets on the Hub once had."""
    folder, marker = tmp_path / "whales", tmp_path / "marker"
    folder.mkdir()
    (folder / "whales.py").write_text(CODE.format(marker=marker))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"sources: [{{name: a, kind: dataset, path: {folder}}}]\n")
    assert refused(["data", "prepare", str(recipe), "--out", str(tmp_path / "store"), "--workers", "1"], capsys)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "sub/../../secret.safetensors", "", 5])
def test_no_shard_of_a_model_lies_outside_its_folder(
    hf_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: object
) -> None:
    folder = shutil.copytree(hf_folder, tmp_path / "hf")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][max(values["weight_map"])] = name
    shutil.copyfile(
        folder / min(set(map(str, values["weight_map"].values())) - {str(name)}), tmp_path / "secret.safetensors"
    )
    index.write_text(json.dumps(values))
    line = refused(["import", str(folder), str(tmp_path / "out")], capsys)
    assert "must have a weight_map from each tensor to the name of a file beside it" in line


def test_a_law_is_data_and_names_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`schedule.law` is a path of the recipe's author; what the file says opens nothing."""
    values = json.loads((LAWS / "step-law.json").read_text())
    for key, value in {"name": "../../etc/passwd", "source": "__import__('os').system('touch pwned')"}.items():
        (tmp_path / "law.json").write_text(json.dumps(values | {key: value}))
        refused(["scaling", "forecast", str(tmp_path / "law.json"), "--flops", "1e21"], capsys)
    assert not (Path.cwd() / "pwned").exists()

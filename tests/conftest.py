"""Fixtures that several packages' tests share."""

import json
import random
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from data.prepare import prepare
from data.recipe import DataRecipe
from data.store import Store
from tests.workers import Workers

torch.set_num_threads(1)

SUBJECTS = (
    "the whale",
    "a grey ship",
    "my old captain",
    "no sailor",
    "the north wind",
    "every gull",
    "a child of the shore",
)
VERBS = ("follows", "remembers", "hath forgotten", "sings to", "breaks", "waits for", "dreams of", "outruns")
OBJECTS = (
    "the cold sea",
    "a silver net",
    "seven islands",
    "the morning tide",
    "her own name",
    "the lantern's light",
    "1,024 stars",
)
NAMES = ("depth", "width", "tokens", "weights", "shape", "index", "total", "rows")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-parity", action="store_true", help="write parallel/PARITY.md from what the parity tests measure"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Where all tests run, the server of their processes starts while they are collected: both import for seconds."""
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.collectonly:
        forkserver.ensure_running()


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of two sources, `verse` and `code`, 200 small documents each, cut by a byte-level BPE of 512 tokens."""
    folder = tmp_path_factory.mktemp("tiny_store")
    return prepare(write_tiny_recipe(folder), folder / "store")


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Eight processes that run one function after another as ranks of a group."""
    pool = Workers(most=8)
    yield pool
    pool.close()


def write_tiny_recipe(folder: Path, documents: int = 200, vocab_size: int = 512) -> DataRecipe:
    """Write made-up text into `folder` and return the recipe that reads it. The same text on every machine."""
    words = random.Random(0)
    verse = ["\n".join(_verse(words) for _ in range(words.randint(3, 14))) + "\n" for _ in range(documents)]
    code = ["\n".join(_function(words) for _ in range(words.randint(1, 4))) for _ in range(documents)]
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in verse)
    (folder / "verse.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "code.txt").write_text("\f".join(code), encoding="utf-8")
    sources = [
        {"name": "verse", "kind": "jsonl", "path": str(folder / "verse.jsonl"), "weight": 0.75},
        {"name": "code", "kind": "text", "path": str(folder / "code.txt"), "separator": "\f", "weight": 0.25},
    ]
    tokenizer = {"kind": "bpe", "vocab_size": vocab_size}
    return DataRecipe.model_validate({"sources": sources, "tokenizer": tokenizer, "validation": 0.1})


def _verse(words: random.Random) -> str:
    line = f"{words.choice(SUBJECTS)} {words.choice(VERBS)} {words.choice(OBJECTS)}{words.choice(',;:.')}"
    return line[0].upper() + line[1:]


def _function(words: random.Random) -> str:
    name, argument = words.sample(NAMES, 2)
    number = words.randint(2, 512)
    return f"def {name}({argument}):\n    if {argument} > {number}:\n        return {argument} - {number}\n    return {argument}\n"

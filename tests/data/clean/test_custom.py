"""A step of the user's own, and what is said when it is not one."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data.clean import Custom
from data.documents import Document, Rejected
from data.errors import DataError

MODULE = """
from dataclasses import replace
from data.documents import Rejected

class Shout:
    def __init__(self, mark="!"):
        self.mark = mark
    def apply(self, document):
        if not document.text:
            return Rejected("silent")
        return replace(document, text=document.text.upper() + self.mark)

class Wrong:
    def apply(self, document):
        return document.text

class Breaks:
    def apply(self, document):
        return 1 / 0

class NoStep:
    pass
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_steps.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("1 +")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_steps", "own_broken"):
        sys.modules.pop(name, None)


def test_a_class_by_its_import_path_is_a_step() -> None:
    document = Document("hello", "here")
    assert Custom(step="own_steps:Shout").build().apply(document) == replace(document, text="HELLO!")
    assert Custom(step="own_steps:Shout", options={"mark": "?"}).build().apply(document).text == "HELLO?"
    assert Custom(step="own_steps:Shout").build().apply(replace(document, text="")) == Rejected("silent")


def test_the_files_of_a_step_are_its_module_which_is_not_imported_for_that(tmp_path: Path) -> None:
    assert Custom(step="own_steps:Shout").files() == [tmp_path / "own_steps.py"]
    assert Custom(step="own_broken:Shout").files() == [tmp_path / "own_broken.py"]
    assert "own_steps" not in sys.modules
    assert Custom(step="own_nothing:Shout").files() == Custom(step="own_nothing.inner:Shout").files() == []
    assert Custom(step="itertools:count").files() == []


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        ("own_nothing:Shout", {}, r"step: own_nothing:Shout: no module 'own_nothing'; install it, or put its folder on PYTHONPATH"),
        ("own_broken:Shout", {}, r"importing own_broken raised SyntaxError: .*; mend the module"),
        ("own_steps:Shoot", {}, r"own_steps.py has no 'Shoot'; write package.module:Class"),
        ("own_steps:Shout", {"loud": 1}, r"options \{'loud': 1\}: TypeError: .* 'loud'; give what it takes"),
        ("own_steps:NoStep", {}, r"has no method apply\(document\); a step returns the document, or a Rejected"),
    ],
)  # fmt: skip
def test_what_is_no_step_is_refused_in_one_line(step: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        Custom(step=step, options=options).build()
    assert "\n" not in str(error.value)


def test_another_result_is_refused_with_the_document() -> None:
    with pytest.raises(DataError, match=r"own_steps:Wrong: returned a str for here:7; apply must return"):
        Custom(step="own_steps:Wrong").build().apply(Document("hello", "here:7"))


def test_a_failure_says_on_which_document() -> None:
    with pytest.raises(ZeroDivisionError) as error:
        Custom(step="own_steps:Breaks").build().apply(Document("hello", "here:7"))
    assert error.value.__notes__ == ["steps: custom: step: own_steps:Breaks: on the document here:7"]

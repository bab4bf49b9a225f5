"""Encodings are repaired, and nothing that was meant is changed."""

import sys
import time
import unicodedata
from pathlib import Path

import ftfy
import pytest

from data.clean import Normalise
from data.documents import Document, Rejected


def mended(text: str, **settings: object) -> str:
    result = Normalise(**settings).build().apply(Document(text, "here"))
    assert isinstance(result, Document)
    return result.text


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("schÃ¶n", "schön"),  # UTF-8 read as Latin-1
        ("itâ€™s", "it’s"),  # as Windows-1252
        ("It\x92s", "It’s"),  # Windows-1252 read as Latin-1
        ("a\r\nb\rc\u2028d\n", "a\nb\nc\nd\n"),
        ("a\x00b\x07c\x7f\ufeffd\x1b[31me", "abcde"),
        ("cafe\u0301", "café"),
        ("\ud83d\ude00", "😀"),
    ],
)  # fmt: skip
def test_what_was_broken_is_mended(broken: str, whole: str) -> None:
    assert mended(broken) == whole
    assert mended(whole) == whole


@pytest.mark.parametrize(
    "text",
    [
        "“Curly” ‘quotes’ — and … ﬁne ligatures",
        "&lt;p&gt; &amp; &eacute;",
        "全角，标点。Ａ！",
        "if (a < b) {\n\tprintf(\"%d\\n\", x);\x0c\n}",
        "10³ µm ½ Ångström naïve",
        "  spaces and\ttabs stay  \n\n\n",
    ],
)  # fmt: skip
def test_what_was_meant_stays(text: str) -> None:
    document = Document(text, "here")
    assert Normalise().build().apply(document) is document


def test_each_setting_does_what_it_says() -> None:
    assert mended("“q”", quotes=True) == '"q"'
    assert mended("&lt;", html_entities=True) == "<"
    assert mended("ﬁ", ligatures=True) == "fi"
    assert mended("Ａ！", character_width=True) == "A!"
    assert mended("10³", unicode="NFKC") == "103"
    for setting, text in {
        "encoding": "schÃ¶n",
        "line_ends": "a\r\nb",
        "control_characters": "a\x07\ufeff",
        "surrogates": "\ud83d\ude00",
    }.items():
        assert mended(text, **{setting: False}) == text
    assert mended("cafe\u0301", unicode=None) == "cafe\u0301"


def test_passing_by_plain_lines_changes_nothing() -> None:
    config = ftfy.TextFixerConfig(
        unescape_html=False, fix_latin_ligatures=False, fix_character_width=False, uncurl_quotes=False, explain=False
    )
    library = Path(sys.modules["os"].__file__ or "").parent
    sources = [path.read_text(encoding="latin-1") for path in sorted(library.glob("*.py"))]  # UTF-8 read wrongly
    sources = [source for source in sources if not source.isascii()]
    assert len(sources) > 3
    for source in sources:
        assert mended(source) == ftfy.fix_text(source, config)


@pytest.mark.parametrize("text", ["", " \n\t ", "\x00\x01\ufeff", "\r\n\r\n"])
def test_a_document_left_empty_is_rejected(text: str) -> None:
    assert Normalise().build().apply(Document(text, "here")) == Rejected("empty")


def test_a_run_of_accents_is_not_composed_at_once() -> None:
    run = "a" + "\u0315\u0300" * 20_000  # four times the length would take sixteen times as long
    start = time.process_time()
    unicodedata.normalize("NFC", run)
    at_once = time.process_time() - start
    mended(run)
    assert time.process_time() - start - at_once < 0.7 * at_once

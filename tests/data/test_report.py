"""The report of a preparation: its record in the store, and the page that shows all of it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from data.counts import Count
from data.dedup.duplicates import Pair, Summary
from data.errors import DataError
from data.report.page import render, write_report
from data.report.shape import Packing, RejectedDocument, Report, Stage, Tokens, Unreadable, UnreadableRecord

SEEN = {
    "recipe",
    "where",
    "kept",
    "fallen",
    "text",
    "kept_text",
    "fallen_text",
    "detail",
    "reason",
    "name",
    "source",
    "step",
}


NO_SOURCES: dict[str, Any] = {
    "languages": {},
    "lengths": {},
    "token_lengths": {},
    "tokens": {},
    "duplicates": Summary(removed={}, clusters={}, examples=[]),
}


def test_every_number_and_every_text_of_the_report_is_on_the_page() -> None:
    report = example()
    page = Page(render(report))
    words = " ".join(page.words.split())
    for number in numbers(report.model_dump()):
        written = f"{number:,}" if isinstance(number, int) else f"{number:.3f}"
        assert re.search(rf"(?<![\d,.]){re.escape(written)}(?![\d,.]*\d)", words), number
    for text in texts(report.model_dump()):
        assert " ".join(text.split()) in words, text
    assert all(f"{percent} %" in words for percent in ("1.2", "0.67", "0.45"))  # of the packing


def test_the_funnel_counts_what_each_step_took_and_leaves_sources_without_it_alone() -> None:
    page = Page(render(example()))
    # after: documents, fell, bytes (exact in their title), share of the bytes that were read
    assert page.row("read")[:4] == ["1,100", "–", "6.00\u202fMB", "100\u202f%"]
    assert page.row("language")[:4] == [
        "1,050",
        "50",
        "5.50\u202fMB",
        "91.7\u202f%",
    ]  # of web alone: books has no such step
    assert page.row("near duplicates")[:4] == ["1,001", "40", "5.05\u202fMB", "84.1\u202f%"]


def test_rejected_documents_are_shown_in_the_order_of_the_steps() -> None:
    def document(step: str, reason: str) -> RejectedDocument:
        return RejectedDocument(source="web", step=step, reason=reason, where="w", text=" t")

    rejected = {"web": {"b": {"few": Count(documents=2), "many": Count(documents=5)}, "a": {"one": Count(documents=1)}}}
    stages = [Stage(name=name, sources={"web": Count(documents=9)}) for name in ("read", "b", "a")]
    examples = [document("a", "one"), document("b", "few"), document("b", "many")]
    report = example().model_copy(update={"stages": stages, "rejected": rejected, "examples": examples} | NO_SOURCES)
    words = " ".join(Page(render(report)).words.split("Rejected documents")[-1].split())
    assert (
        "b 7 documents many 5 documents, 1 shown web · w t few 2 documents, 1 shown web · w t a 1 document one 1 document, 1 shown"
        in words
    )


def test_texts_are_shown_and_never_run() -> None:
    attack = "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)>\"' onmouseover='alert(1)' {{ 7 * 7 }} ${x}"
    page = Page(render(example(attack)))
    plain = Page(render(example()))
    assert page.tags == plain.tags
    assert page.attributes == plain.attributes
    assert page.words.count(attack) > 20


def test_the_recipe_is_shown_with_all_its_settings() -> None:
    page = Page(render(example(), {"sources": [{"name": "<b>ä</b>", "weight": 1.5, "steps": None}], "seed": 7}))
    assert page.words.rstrip().endswith("sources:\n- name: <b>ä</b>\n  weight: 1.5\n  steps: null\nseed: 7")
    assert "The whole recipe" not in Page(render(example())).words


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    text = render(example())
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    targets = [value for name, value in page.values if name in ("href", "xlink:href", "src", "action")]
    assert targets and all(value.startswith("#") for value in targets)
    assert "url(" not in text.replace("url(#", "") and "@import" not in text


def test_equal_reports_give_equal_bytes(tmp_path: Path) -> None:
    report = example()
    report.write(tmp_path)
    write_report(report, tmp_path / "here.html")
    program = "import sys; from pathlib import Path; from data.report.page import *; from data.report.shape import *; "
    program += "folder = Path(sys.argv[1]); write_report(Report.read(folder), folder / 'there.html')"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env={"PYTHONHASHSEED": "7"})
    assert (tmp_path / "here.html").read_bytes() == (tmp_path / "there.html").read_bytes()


@pytest.mark.parametrize(("place", "said"), [("", "is a folder"), ("none/page.html", "there is no folder .*none")])
def test_a_page_needs_a_file_name_in_a_folder_that_exists(tmp_path: Path, place: str, said: str) -> None:
    with pytest.raises(DataError, match=rf"^html = '.*': .*{said}; give the page a file's name"):
        write_report(example(), tmp_path / place)


def test_a_report_without_steps_duplicates_or_references_has_a_page() -> None:
    nothing = Report(
        recipe="plain",
        versions={},
        stages=[Stage(name="read", sources={"text": Count(documents=1, bytes=10)})],
        rejected={},
        unreadable={"text": Unreadable(reasons={})},
        languages={"text": {"unknown": Count(documents=1, bytes=10)}},
        lengths={"text": {4: 1}},
        token_lengths={},
        duplicates=Summary(removed={"text": {"exact": Count(), "near": Count()}}, clusters={}, examples=[]),
        tokens={
            "text": {
                "train": Tokens(documents=1, tokens=4, bytes=10),
                "validation": Tokens(documents=0, tokens=0, bytes=0),
            }
        },
    )
    words = Page(render(nothing)).words
    assert "None fell." in words and "None were rejected." in words and "Every record gave a document." in words
    assert "3.333" in words  # 10 bytes in 3 tokens and one that ends the document


def test_the_report_of_a_store_is_read_as_it_was_written(tmp_path: Path) -> None:
    example().write(tmp_path)
    assert Report.read(tmp_path) == example()


def test_a_missing_or_foreign_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"report\.json: cannot be read \(No such file or directory\); give the folder of a store"
    ):
        Report.read(tmp_path)
    (tmp_path / "report.json").write_text('{"recipe": 3}')
    with pytest.raises(DataError, match=r"report\.json: recipe: .* prepare the store again"):
        Report.read(tmp_path)


class Page(HTMLParser):
    """What a browser would take the page for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.values: list[tuple[str, str]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]
        self.values += [(name, value or "") for name, value in attributes]
        self.words += "".join(f" {value} " for name, value in attributes if name == "title")
        if tag in ("tr", "td", "th"):
            self.words += "\n" if tag == "tr" else "\t"

    def handle_data(self, data: str) -> None:
        self.words += data

    def row(self, name: str) -> list[str]:
        """The cells of the first row of that name, without titles."""
        cells = next(cells for line in self.words.split("\n") if (cells := line.split("\t"))[1:2] == [name])
        return [cell.split(" bytes ")[-1].strip() for cell in cells[2:]]


def numbers(value: Any, key: str = "") -> Iterator[int | float]:
    """All counts: what a histogram counts, not the powers of two that name its bins."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, key)
    elif isinstance(value, int) or (isinstance(value, float) and not key.startswith(("cut_by_", "padding_of_"))):
        yield value


def texts(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from texts(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner, key)
    elif isinstance(value, str) and key in SEEN:
        yield value


def example(extra: str = "") -> Report:
    """A report of two sources; `extra` is put into each of its texts."""
    web, books = f"web{extra}", f"books{extra}"

    def counts(web_documents: int, web_bytes: int, books_documents: int, books_bytes: int) -> dict[str, Count]:
        one, other = (
            Count(documents=web_documents, bytes=web_bytes),
            Count(documents=books_documents, bytes=books_bytes),
        )
        return {web: one, books: other}

    return Report(
        recipe=f"two sources{extra}",
        versions={f"datatrove{extra}": f"0.10.1{extra}"},
        stages=[
            Stage(name="read", sources=counts(1000, 5_000_000, 100, 1_000_000)),
            Stage(name="language", sources={web: Count(documents=950, bytes=4_500_123)}),
            Stage(name="exact duplicates", sources=counts(945, 4_400_321, 96, 900_717)),
            Stage(name="near duplicates", sources=counts(913, 4_200_555, 88, 845_454)),
        ],
        rejected={
            web: {
                f"language{extra}": {
                    f"de{extra}": Count(documents=31, bytes=300_111),
                    "other": Count(documents=19, bytes=7),
                }
            }
        },
        unreadable={
            web: Unreadable(
                reasons={f"not_json{extra}": 1207},
                examples=[
                    UnreadableRecord(reason=f"not_json{extra}", where=f"a.jsonl:7{extra}", detail=f"ends early{extra}")
                ],
            )
        },
        languages={
            web: {f"en{extra}": Count(documents=949, bytes=4_499_999), "zh": Count(documents=1, bytes=124)},
            books: {},
        },
        lengths={web: {10: 201, 12: 749}, books: {14: 97, 20: 3}},
        token_lengths={web: {8: 202, 10: 711}, books: {12: 85, 18: 3}},
        duplicates=Summary(
            removed={
                web: {"exact": Count(documents=5, bytes=99_802), "near": Count(documents=32, bytes=199_766)},
                books: {"exact": Count(documents=4, bytes=99_283), "near": Count(documents=8, bytes=55_263)},
            },
            clusters={2: 41, 3: 4, 9: 1, 1100: 2},
            examples=[
                Pair(
                    kind="near",
                    kept=f"b.txt:1{extra}",
                    fallen=f"b.txt:2{extra}",
                    kept_text=f"a whale sings{extra}",
                    fallen_text=f"a gull sings{extra}",
                )
            ],
        ),
        tokens={
            web: {
                "train": Tokens(documents=901, tokens=1_100_202, bytes=4_100_001, reference_bytes_per_token=4.217),
                "validation": Tokens(documents=12, tokens=30_303, bytes=100_554, reference_bytes_per_token=4.303),
            },
            books: {"train": Tokens(documents=88, tokens=250_404, bytes=845_454)},
        },
        reference=f"deepseek{extra}",
        packing={4096: Packing(cut_by_windows=0.0123, cut_by_best_fit=0.0067, padding_of_best_fit=0.0045)},
        examples=[
            RejectedDocument(
                source=web,
                step=f"c4{extra}",
                reason=f"javascript{extra}",
                where=f"w:1{extra}",
                text=f"Enable it{extra}",
            )
        ],
    )

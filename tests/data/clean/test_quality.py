"""The rules of Gopher, C4 and FineWeb, against datatrove's own filters on the same documents, and by hand."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from datatrove.data import Document as TheirDocument
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.text import PUNCTUATION_SET, split_into_parts, split_into_words
from pydantic import ValidationError

from data.clean import C4, FineWeb, GopherQuality, GopherRepetition
from data.clean.quality import LETTER_RUN, QualityRecord
from data.documents import Document, Rejected
from data.errors import DataError
from tests.data.clean.texts import lines, made_up, prose

STOP = "the of "  # two stop words
PAIRS: list[tuple[type[QualityRecord], Callable[..., Any]]] = [
    (GopherQuality, GopherQualityFilter),
    (GopherRepetition, GopherRepetitionFilter),
    (C4, C4QualityFilter),
    (FineWeb, FineWebQualityFilter),
]


def blocks(n: int, share: float) -> str:
    """Twelve blocks of n words, each twice, and single words around them, so that `share` of the characters repeat a block.

    12·n words of six letters come a second time: 72·n characters of 7·(24·n + singles) in all.
    """
    singles = round(72 * n / share / 7 - 24 * n)
    around = made_up(singles)
    twice = [made_up(n, 2000 + n * i) for i in range(12)] * 2
    at = singles // 24
    text = [word for i, block in enumerate(twice) for word in [*around[i * at : (i + 1) * at], *block]]
    return " ".join([*text, *around[24 * at :]])


def often(n: int, share: float) -> str:
    """A block of n three-letter words ten times, which is `share` of the characters: 10·(4n − 1) of all."""
    block = ["abc", "bcd", "cde", "def"][:n]
    singles = round((10 * (4 * n - 1) / share - 40 * n) / 7)
    around = made_up(singles)
    at = singles // 10
    return " ".join(word for i in range(10) for word in [*block, *around[i * at : (i + 1) * at]])


# For each filter, a document for each reason it gives. The numbers are its threshold and what the document has.
PLANTED: dict[type[QualityRecord], dict[str, str]] = {
    GopherQuality: {
        "short_doc": STOP + " ".join(made_up(47)),  # 49 words of 50
        "long_doc": "the of " * 50_001,  # 100,002 words of 100,000
        "below_avg_threshold": STOP + "ab " * 60,  # (3 + 2 + 60·2)/62 = 2.02 letters of 3
        "above_avg_threshold": STOP + " ".join(word + "abcde" for word in made_up(60)),  # (5 + 60·11)/62 = 10.7 of 10
        "too_many_hashes": STOP + " ".join(made_up(60)) + " #" * 8,  # 8 of 70 words = 0.114 of 0.1
        "too_many_ellipsis": STOP + " ".join(made_up(60)) + " …" * 8,
        "too_many_bullets": STOP + "\n" + lines(11, 6, begin="- "),  # 11 of 12 lines = 0.92 of 0.9
        "too_many_end_ellipsis": STOP + "\n" + lines(4, 18, end="...") + "\n" + lines(8, 9),  # 4 of 13 = 0.31 of 0.3
        "below_alpha_threshold": STOP + " ".join(made_up(60)) + " 1234" * 16,  # 62 of 78 words = 0.795 of 0.8
        "enough_stop_words": "the " + " ".join(made_up(60)),  # 1 of 2
    },
    GopherRepetition: {
        "empty": "",
        "dup_para_frac": "\n\n".join(["ab", "ab", lines(1, 60)]),  # 1 of 3 = 0.33 of 0.3
        "dup_para_char_frac": "\n\n".join([lines(1, 9)] * 2 + [lines(1, 5, start=100 * i) for i in range(1, 5)]),
        "dup_line_frac": "\n".join(["ab", "ab", lines(1, 60)]),
        "dup_line_char_frac": "\n".join([lines(1, 9)] * 2 + [lines(1, 5, start=100 * i) for i in range(1, 5)]),
        "top_2_gram": often(2, 0.22),  # of 0.20
        "top_3_gram": often(3, 0.19),  # of 0.18; its 2-grams have 7/11 of that
        "top_4_gram": often(4, 0.17),  # of 0.16; its 3-grams have 11/15 of that
        "duplicated_5_n_grams": blocks(5, 0.16),  # of 0.15
        "duplicated_6_n_grams": blocks(6, 0.148),  # of 0.14; as 5-grams 5/6 of that
        "duplicated_7_n_grams": blocks(7, 0.138),  # of 0.13, and so on
        "duplicated_8_n_grams": blocks(8, 0.128),
        "duplicated_9_n_grams": blocks(9, 0.115),
        "duplicated_10_n_grams": blocks(10, 0.105),
    },
    C4: {
        "too_few_sentences": lines(4, 6),  # 4 of 5
        "lorem_ipsum": lines(6, 6) + "\nLorem ipsum dolor sit.",
        "curly_bracket": lines(6, 6) + "\nA { stands here.",
    },
    FineWeb: {
        "empty": " \n \n",
        "line_punct_ratio": lines(1, 8) + "\n" + lines(8, 8, end=""),  # 1 of 9 lines = 0.11 of 0.12
        "short_line_ratio": lines(3, 8) + "\n" + lines(7, 4),  # 7 of 10 lines = 0.7 of 0.67
        "char_dup_ratio": lines(20, 9) + "\n" + lines(1, 9),  # 63 of 1323 characters = 0.048 of 0.01
        "list_ratio": "\n\n".join(
            lines(1, 1, end="abcdefghijklmnopqrstuvwxyz.", start=i) for i in range(20)
        ),  # 38 of 40 words
    },
}
KEPT = {  # what no rule of the filter touches
    GopherQuality: STOP + lines(12, 6),
    GopherRepetition: lines(12, 9),
    C4: lines(6, 6),
    FineWeb: lines(20, 9),
}
C4_LINES = {  # what becomes of a line beside the six of KEPT[C4]
    "no mark at its end": "",
    "two words.": "",
    "It trails off ...": "",
    "The word " + 1001 * "a" + " is long.": "",
    "Please enable JavaScript now.": "",
    "Read our privacy policy.": "",
    "It is so.[1] They say[citation needed] so.": "It is so. They say so.",
}
ODD = [
    "",
    " ",
    "\n\n\n",
    "!?! ... ,,;",
    "\0",
    "\ufeff",
    "\u0301",
    "IS_ALPHA",
    "</s>",
    "\x1c\x85\u2028",
    "中" * 5000,
    "a" * 50_000,
    "x. " * 3000,
]


def documents(record: type[QualityRecord]) -> list[str]:
    c4 = [KEPT[C4] + "\n" + line for line in C4_LINES]
    return [*prose(), *PLANTED[record].values(), *KEPT.values(), *c4, *ODD]


def theirs(judge: Any, text: str) -> tuple[str, str]:
    """datatrove's verdict as ("" or its reason, the text it leaves)."""
    document = TheirDocument(text=text, id="")
    result = judge.filter(document)
    return (result[1], text) if isinstance(result, tuple) else ("", document.text)


def ours(step: Any, text: str) -> tuple[str, str]:
    result = step.apply(Document(text, "here"))
    return (result.reason, text) if isinstance(result, Rejected) else ("", result.text)


@pytest.mark.parametrize(("record", "judge"), PAIRS)
def test_each_verdict_and_text_is_datatroves(record: type[QualityRecord], judge: Callable[..., Any]) -> None:
    step, reference = record().build(), judge()
    texts = documents(record)
    verdicts = [theirs(reference, text) for text in texts]
    assert [ours(step, text) for text in texts] == [(reason.removeprefix("gopher_"), text) for reason, text in verdicts]
    assert len({reason for reason, _ in verdicts}) > len(PLANTED[record])


@pytest.mark.parametrize("record", PLANTED)
def test_each_reason_is_given_where_its_rule_is_broken(record: type[QualityRecord]) -> None:
    step = record().build()
    assert {reason: ours(step, text)[0] for reason, text in PLANTED[record].items()} == {r: r for r in PLANTED[record]}
    assert ours(step, KEPT[record]) == ("", KEPT[record])


def test_c4_drops_lines_and_keeps_the_rest() -> None:
    step = C4().build()
    for line, remains in C4_LINES.items():
        assert ours(step, KEPT[C4] + "\n" + line) == ("", (KEPT[C4] + "\n" + remains).strip())


@pytest.mark.parametrize(("record", "judge"), PAIRS)
def test_the_defaults_are_datatroves(record: type[QualityRecord], judge: Callable[..., Any]) -> None:
    assert settings(record().filter("en")) == settings(judge())


@pytest.mark.parametrize(
    ("record", "changed"),
    [
        (
            GopherQuality(
                min_words=1, max_words=3, min_mean_word_length=2, max_mean_word_length=4, max_symbols_per_word=0.5,
                max_bullet_lines=0.6, max_ellipsis_lines=0.7, min_alphabetic_words=0.85, min_stop_words=9, stop_words=["der"],
            ),
            GopherQualityFilter(1, 3, 2, 4, 0.5, 0.6, 0.7, 0.85, 9, ["der"]),
        ),
        (
            GopherRepetition(
                max_duplicate_lines=0.1, max_duplicate_paragraphs=0.15, max_duplicate_line_characters=0.25,
                max_duplicate_paragraph_characters=0.35, max_top_ngram={7: 0.45}, max_duplicate_ngrams={8: 0.55, 6: 0.65},
            ),
            GopherRepetitionFilter(0.1, 0.15, 0.25, 0.35, ((7, 0.45),), ((6, 0.65), (8, 0.55))),
        ),
        (
            C4(
                by_line=False, remove_citations=False, terminal_punctuation=False, min_sentences=None, min_line_words=None,
                max_word_length=None, reject_lorem_ipsum=False, drop_javascript=False, reject_curly_brackets=False,
                drop_policies=False,
            ),
            C4QualityFilter(None, False, False, False, -1, -1, -1, False, False, False, False),
        ),
        (
            FineWeb(
                min_punctuated_lines=0.1, unpunctuated=True, stop_characters=["~"], max_short_lines=0.2, short_line=3,
                max_duplicate_line_characters=0.4, max_line_breaks_per_word=0.5,
            ),
            FineWebQualityFilter(None, 0.1, True, ("~",), 0.2, 3, 0.4, 0.5),
        ),
    ],
)  # fmt: skip
def test_each_setting_reaches_datatrove(record: QualityRecord, changed: Any) -> None:
    assert settings(record.filter("en")) == settings(changed)
    defaults = settings(type(changed)())
    assert all(settings(changed)[name] != defaults[name] for name in taken(type(changed)))
    assert len(type(record).model_fields) - 2 == len(taken(type(changed)))  # all but kind and languages


def settings(judge: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(judge).items() if name not in ("stats", "language")}


def taken(judge: Callable[..., Any]) -> set[str]:
    """What a filter of datatrove can be told, by the names of its attributes."""
    names = set(inspect.signature(judge).parameters) - {"language", "exclusion_writer"}
    renamed = {"short_line_thr": "short_line_threshold"}
    return {renamed.get(name, name) for name in names}


def test_a_filter_looks_at_its_languages_and_at_the_unknown_ones() -> None:
    step = GopherQuality(languages=["en", "de"]).build()
    short = [Document("ein Wort", "here", language) for language in (None, "en", "de", "fr")]
    assert [isinstance(step.apply(document), Rejected) for document in short] == [True, True, True, False]


def test_words_are_cut_in_the_language_of_the_document() -> None:
    # 60 Chinese characters: for English rules one long word, for Chinese ones, by jieba, 40 words: 我们 / 在 / 学校
    step = GopherQuality(languages=["en", "zh"], min_words=36, min_mean_word_length=1, min_stop_words=None).build()
    text = "我们在学校" * 12
    assert ours(step, text) == ("short_doc", text)
    assert step.apply(Document(text, "here", "zh")) == Document(text, "here", "zh")


def test_a_language_without_words_is_refused() -> None:
    with pytest.raises(DataError, match=r"^steps: c4: languages: 'english': datatrove has no words for it"):
        C4(languages=["english"]).build()


def test_steps_that_follow_each_other_share_the_words() -> None:
    steps = [GopherRepetition().build(), GopherQuality().build()]
    split_into_parts.cache_clear()
    for step in steps:
        step.apply(Document(KEPT[GopherQuality], "here"))
    assert split_into_parts.cache_info().hits == 1


def test_a_document_is_not_searched_for_hours() -> None:
    # spaCy takes off one of these after the other, each time searching what is left.
    for run in ("(" * 300_000, "😀" * 300_000, "=_" * 150_000, "'s" * 150_000):
        assert ours(GopherQuality().build(), KEPT[GopherQuality] + run)[0] == "symbol_run"


def test_a_long_document_falls_before_its_words_are_cut() -> None:
    assert ours(GopherQuality().build(), "the of " * 1_000_000)[0] == "long_doc"  # 7 MB would be cut for 15 s
    assert not any(
        LETTER_RUN.match(character) for character in PUNCTUATION_SET
    )  # so a run with a letter has a word that counts
    with pytest.raises(ValidationError, match="min_words: 60: is more than max_words = 50; lower it"):
        GopherQuality(min_words=60, max_words=50)


def test_what_spacy_remembers_changes_no_word() -> None:
    text = prose()[0]
    before = list(split_into_words(text))
    ours(GopherQuality().build(), text)
    split_into_parts.cache_clear()
    assert split_into_words(text) == before

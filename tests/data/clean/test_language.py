"""Languages are identified, and what is not wanted or not sure falls."""

import pytest
from pydantic import ValidationError

from data.clean import Language
from data.documents import Document, Rejected

TEXTS = {
    "en": "The house on the hill was sold last year, and nobody knows who lives there now.",
    "de": "Das Haus auf dem Hügel wurde letztes Jahr verkauft, und niemand weiß, wer jetzt dort wohnt.",
    "fr": "La maison sur la colline a été vendue l’année dernière et personne ne sait qui y habite.",
    "zh": "山上的房子去年卖掉了，现在没有人知道谁住在那里。",
    "ru": "Дом на холме продали в прошлом году, и никто не знает, кто там сейчас живёт.",
}


@pytest.mark.parametrize("code", TEXTS)
def test_a_language_is_recognised(code: str) -> None:
    assert Language().build().apply(Document(TEXTS[code], "here")) == Document(TEXTS[code], "here", code)


def test_only_the_kept_languages_stay() -> None:
    step = Language(keep=["en", "zh"]).build()
    kept = [code for code, text in TEXTS.items() if isinstance(step.apply(Document(text, "here")), Document)]
    assert kept == ["en", "zh"]
    assert step.apply(Document(TEXTS["de"], "here")) == Rejected("other_language")


def test_a_language_that_the_source_states_is_believed() -> None:
    step = Language(keep=["en", "lzh"]).build()
    assert step.apply(Document("x = 1", "here", "en")) == Document("x = 1", "here", "en")
    assert step.apply(Document(TEXTS["zh"], "here", "lzh")) == Document(TEXTS["zh"], "here", "lzh")
    assert step.apply(Document(TEXTS["en"], "here", "fr")) == Rejected("other_language")


@pytest.mark.parametrize("text", ["", "\n", "1 2 3", "x=1;", "\0", "</s>"])
def test_what_says_nothing_is_unsure(text: str) -> None:
    assert Language().build().apply(Document(text, "here")) == Rejected("unsure")


def test_the_least_score_is_a_setting() -> None:
    document = Document("hello", "here")  # English by 0.24, French by 0.10
    assert Language().build().apply(document) == Rejected("unsure")
    assert Language(min_score=0.2).build().apply(document) == Document("hello", "here", "en")


def test_the_whole_text_counts() -> None:
    step = Language().build()
    for begin in ("</s> ", TEXTS["de"] + "\n"):
        result = step.apply(Document(begin + "\n".join([TEXTS["en"]] * 100), "here"))
        assert isinstance(result, Document)
        assert result.language == "en"


def test_a_language_is_named_by_its_code() -> None:
    with pytest.raises(ValidationError, match="ISO 639"):
        Language(keep=["english"])

"""The quality rules of Gopher, C4 and FineWeb, as datatrove implements them, with the thresholds of the papers.

datatrove's filters decide; what is here names their settings, says to which languages they apply, and keeps away what they cannot
take. The papers set their thresholds on English, so a filter looks at documents of its `languages` and at those whose language is
not known; the others pass it untouched. Words are cut as the document's language needs it (spaCy; jieba for Chinese).

FineWeb ran gopher_repetition, gopher_quality, c4 with `terminal_punctuation: false`, then fineweb. Two steps that follow each other
share a document's words where the first left its text alone.
"""

import re
from abc import abstractmethod
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from data.clean.packages import import_package
from data.clean.step import Step, StepRecord
from data.documents import Document, Rejected
from data.errors import DataError

if TYPE_CHECKING:
    from datatrove.pipeline.filters.base_filter import BaseFilter

# spaCy takes such a run off one character at a time, each time searching the rest: 0.1 s for a thousand, hours for a million.
SYMBOL_RUN = re.compile(r"(?:[^\w\s]|_|['’][sS]){1000}")
LETTER_RUN = re.compile(r"[^\W\d_]\S*")
WARM_UP = 1_000_000  # characters after which spaCy knows most of the words it meets: twice the speed, for 30 MB
THEIR_CODE = {"zh": "cmn"}  # by "zh" datatrove means Chinese in Latin letters

Share = Annotated[float, Field(gt=0, le=1)]
NGrams = dict[Annotated[int, Field(ge=1)], Share]


class QualityRecord(StepRecord):
    """A filter of datatrove, and the languages whose documents it looks at. A threshold of `null` switches its rule off."""

    kind: str
    languages: list[str] = Field(default=["en"], min_length=1)  # a document without one counts as the first of them

    def build(self) -> Step:
        """Import datatrove, and the words of each language.

        Raises:
            DataError: a package is missing, or datatrove knows no words for one of the languages.
        """
        where = f"steps: {self.kind}"
        words = import_package("datatrove.utils.word_tokenizers", "datatrove", where)
        judges = {}
        for language in self.languages:
            code = THEIR_CODE.get(language, language)
            if code == "cmn":
                import_package("jieba", "jieba", where).setLogLevel(
                    "WARNING"
                )  # else it tells of its dictionary on stderr
            try:
                words.load_word_tokenizer(code).word_tokenize("word")
            except ValueError:
                raise DataError(
                    f"{where}: languages: {language!r}: datatrove has no words for it; leave it out"
                ) from None
            except ImportError as error:
                raise DataError(f"{where}: languages: {language!r}: {error}") from None
            judges[language] = (self.filter(code), _memory(code))
        return _Quality(self, judges)

    def settled(self, text: str) -> str | None:
        """The reason for which a text falls, where that is known without cutting its words."""
        return "symbol_run" if SYMBOL_RUN.search(text) else None

    @abstractmethod
    def filter(self, language: str) -> "BaseFilter":
        """datatrove's filter with these settings, by datatrove's code of a language."""


class _Quality:
    """Asks the filter of the document's language."""

    def __init__(self, record: QualityRecord, judges: dict[str, tuple["BaseFilter", "_Memory"]]) -> None:
        from datatrove.data import Document as TheirDocument

        self._settled = record.settled
        self._judges = judges
        self._default = next(iter(judges))
        self._theirs = TheirDocument

    def apply(self, document: Document) -> Document | Rejected:
        """The document as the filter leaves it, or the reason that datatrove gives, or "symbol_run", or "empty"."""
        language = document.language or self._default
        if language not in self._judges:
            return document
        if reason := self._settled(document.text):
            return Rejected(reason)
        judge, memory = self._judges[language]
        memory.fill(document.text)
        theirs = self._theirs(text=document.text, id=document.where)
        verdict = judge.filter(theirs)
        if isinstance(verdict, tuple):
            return Rejected(verdict[1].removeprefix("gopher_"))
        if not theirs.text:
            return Rejected("empty")
        return document if theirs.text == document.text else replace(document, text=theirs.text)


class _Memory:
    """How spaCy cuts the words that it has met.

    datatrove has it forget them after every text, for C4 after every line, and cutting the same words anew is most of its time.
    What spaCy cuts outside of datatrove's hands it remembers, so the first texts of a process are cut once more there.
    """

    def __init__(self, language: str) -> None:
        from datatrove.utils.word_tokenizers import SpaCyTokenizer, load_word_tokenizer
        from spacy.tokenizer import Tokenizer

        words = load_word_tokenizer(language)
        cut = words.tokenizer.tokenizer if isinstance(words, SpaCyTokenizer) else None
        self._cut = cut if isinstance(cut, Tokenizer) else None  # others keep no words
        self._missing = WARM_UP

    def fill(self, text: str) -> None:
        if self._missing > 0 and self._cut is not None:
            self._cut(text[: self._missing])
            self._missing -= len(text)


_memory = cache(_Memory)  # one for a language


class GopherQuality(QualityRecord):
    """Quality rules of MassiveText (Gopher, Rae et al. 2021, §A1.1)."""

    kind: Literal["gopher_quality"] = "gopher_quality"
    min_words: int = Field(default=50, ge=1)  # words with something else than punctuation
    max_words: int | None = Field(default=100_000, ge=1)
    min_mean_word_length: float | None = Field(default=3, gt=0)  # characters
    max_mean_word_length: float | None = Field(default=10, gt=0)
    max_symbols_per_word: float | None = Field(default=0.1, gt=0)  # "#", and "..." with "…"
    max_bullet_lines: Share | None = 0.9  # of the lines, that begin with • or -
    max_ellipsis_lines: Share | None = 0.3  # of the lines, that end with an ellipsis
    min_alphabetic_words: Share | None = 0.8  # of the words, with a letter
    min_stop_words: int | None = Field(default=2, ge=1)  # different ones of `stop_words`
    stop_words: list[str] = Field(default=["the", "be", "to", "of", "and", "that", "have", "with"])

    @model_validator(mode="after")
    def _words_are_a_range(self) -> "GopherQuality":
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(f"min_words: {self.min_words}: is more than max_words = {self.max_words}; lower it")
        return self

    def settled(self, text: str) -> str | None:
        """Also "long_doc", which may be a book of 100 MB: each run without spaces that has a letter holds a word."""
        if self.max_words and next(islice(LETTER_RUN.finditer(text), self.max_words, None), None):
            return "long_doc"
        return super().settled(text)

    def filter(self, language: str) -> "BaseFilter":
        from datatrove.pipeline.filters import GopherQualityFilter

        return GopherQualityFilter(
            min_doc_words=self.min_words,
            max_doc_words=self.max_words,
            min_avg_word_length=self.min_mean_word_length,
            max_avg_word_length=self.max_mean_word_length,
            max_symbol_word_ratio=self.max_symbols_per_word,
            max_bullet_lines_ratio=self.max_bullet_lines,
            max_ellipsis_lines_ratio=self.max_ellipsis_lines,
            max_non_alpha_words_ratio=self.min_alphabetic_words,
            min_stop_words=self.min_stop_words,
            stop_words=self.stop_words,
            language=language,
        )


class GopherRepetition(QualityRecord):
    """Repetition rules of MassiveText (Gopher, Rae et al. 2021, Table A1): shares of a document that repeat the rest of it."""

    kind: Literal["gopher_repetition"] = "gopher_repetition"
    max_duplicate_lines: Share | None = 0.3  # of the lines
    max_duplicate_paragraphs: Share | None = 0.3  # of the paragraphs
    max_duplicate_line_characters: Share | None = 0.2  # of the characters, as all below
    max_duplicate_paragraph_characters: Share | None = 0.2
    max_top_ngram: NGrams = Field(default={2: 0.2, 3: 0.18, 4: 0.16})  # n → in the most frequent n-gram
    # n → in n-grams that came before
    max_duplicate_ngrams: NGrams = Field(default={5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1})

    def filter(self, language: str) -> "BaseFilter":
        from datatrove.pipeline.filters import GopherRepetitionFilter

        return GopherRepetitionFilter(
            dup_line_frac=self.max_duplicate_lines,
            dup_para_frac=self.max_duplicate_paragraphs,
            dup_line_char_frac=self.max_duplicate_line_characters,
            dup_para_char_frac=self.max_duplicate_paragraph_characters,
            top_n_grams=tuple(sorted(self.max_top_ngram.items())),
            dup_n_grams=tuple(sorted(self.max_duplicate_ngrams.items())),
            language=language,
        )


class C4(QualityRecord):
    """Rules of C4 (Raffel et al. 2020, §2.2) without its list of bad words: they drop lines, and then documents.

    `min_sentences` and `min_line_words` are datatrove's, and so FineWeb's, 5 and 3; C4's published code has 3 and 5.
    """

    kind: Literal["c4"] = "c4"
    by_line: bool = True  # as C4; false: sentence by sentence
    remove_citations: bool = True  # "[1]", "[edit]", "[citation needed]"
    terminal_punctuation: bool = True  # drop lines that do not end with . ? ! " or '; FineWeb: false
    min_sentences: int | None = Field(default=5, ge=1)  # in the lines that stay
    min_line_words: int | None = Field(default=3, ge=1)  # drop shorter lines
    max_word_length: int | None = Field(
        default=1000, ge=1
    )  # drop lines with a longer word; of C4's code, not the paper
    reject_lorem_ipsum: bool = True  # documents with "lorem ipsum"
    drop_javascript: bool = True  # lines with "javascript"
    reject_curly_brackets: bool = True  # documents with {
    drop_policies: bool = True  # lines on cookies, privacy and terms of use; of C4's code, not the paper

    def filter(self, language: str) -> "BaseFilter":
        from datatrove.pipeline.filters import C4QualityFilter

        return C4QualityFilter(
            split_paragraph=self.by_line,
            remove_citations=self.remove_citations,
            filter_no_terminal_punct=self.terminal_punctuation,
            min_num_sentences=self.min_sentences or -1,
            min_words_per_line=self.min_line_words or -1,
            max_word_length=self.max_word_length or -1,
            filter_lorem_ipsum=self.reject_lorem_ipsum,
            filter_javascript=self.drop_javascript,
            filter_curly_bracket=self.reject_curly_brackets,
            filter_policy=self.drop_policies,
            language=language,
        )


class FineWeb(QualityRecord):
    """FineWeb's own rules (Penedo et al. 2024), with the values of the code that made it.

    The paper gives 0.1 for `max_duplicate_line_characters`, and no `max_line_breaks_per_word`.
    """

    kind: Literal["fineweb"] = "fineweb"
    min_punctuated_lines: float = Field(default=0.12, ge=0, le=1)  # of the lines, that end like a sentence; 0: off
    unpunctuated: bool = False  # true: a document without any such line stays
    stop_characters: list[str] | None = None  # None: datatrove's, of many scripts
    max_short_lines: float = Field(default=0.67, ge=0, le=1)  # of the lines; 1: off
    short_line: int = Field(default=30, ge=0)  # characters that a short line has at most
    max_duplicate_line_characters: float = Field(default=0.01, ge=0, le=1)  # in lines that came before; 1: off
    max_line_breaks_per_word: float = Field(default=0.3, ge=0)

    def filter(self, language: str) -> "BaseFilter":
        from datatrove.pipeline.filters import FineWebQualityFilter

        return FineWebQualityFilter(
            line_punct_thr=self.min_punctuated_lines,
            line_punct_exclude_zero=self.unpunctuated,
            stop_chars=None if self.stop_characters is None else tuple(self.stop_characters),
            short_line_thr=self.max_short_lines,
            short_line_length=self.short_line,
            char_duplicates_ratio=self.max_duplicate_line_characters,
            new_line_ratio=self.max_line_breaks_per_word,
            language=language,
        )

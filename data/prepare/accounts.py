"""What becomes of documents on their way: counted per shard, added up for the report."""

from collections.abc import Iterable
from typing import NamedTuple

from pydantic import Field

from data.counts import Count
from data.documents import Document, hash_number, text_hash
from data.manifest import Record

EXAMPLES_KEPT = (
    5  # rejected documents shown for each step and reason of a source, and unreadable records of each reason
)
CHARACTERS_SHOWN = 500


class Example(Record):
    """A document that was rejected, to look at."""

    step: str
    reason: str
    where: str
    text: str  # its beginning, as the step saw it
    order: int  # a hash of the text: the smallest are kept, so that a sample does not depend on the shards


class UnreadableExample(Record):
    reason: str
    where: str
    detail: str


class Reading(Record):
    """An input's account: what was read, and into how many shards."""

    shards: int
    read: Count
    unreadable: dict[str, int]
    examples: list[UnreadableExample]


class Cleaning(Record):
    """A shard's account of the cleaning."""

    after: list[Count]  # what was left after each step
    rejected: dict[str, dict[str, Count]]  # step → reason
    languages: dict[str, Count]  # of what is left; "unknown" where nothing said it
    lengths: dict[int, int]  # of what is left: documents of 2^(k−1) … 2^k − 1 bytes, by k
    examples: list[Example]

    @classmethod
    def total(cls, shards: Iterable["Cleaning"], steps: int) -> "Cleaning":
        """The sum over a source's shards."""
        tally = Tally(steps)
        for shard in shards:
            tally.after = [left + more for left, more in zip(tally.after, shard.after, strict=True)]
            for step, reasons in shard.rejected.items():
                for reason, count in reasons.items():
                    tally.reject(step, reason, count)
            for code, count in shard.languages.items():
                tally.languages[code] = tally.languages.get(code, Count()) + count
            for exponent, documents in shard.lengths.items():
                tally.lengths[exponent] = tally.lengths.get(exponent, 0) + documents
            tally.examples = _kept(tally.examples + shard.examples)
        return tally.account()


class Tally:
    """A `Cleaning` in the making."""

    def __init__(self, steps: int) -> None:
        self.after = [Count()] * steps
        self.rejected: dict[str, dict[str, Count]] = {}
        self.languages: dict[str, Count] = {}
        self.lengths: dict[int, int] = {}
        self.examples: list[Example] = []

    def passed(self, step: int, size: int) -> None:
        """A document came through step number `step` with `size` bytes."""
        self.after[step] += Count(documents=1, bytes=size)

    def fell(self, document: Document, step: str, reason: str) -> None:
        """A step rejected a document."""
        self.reject(step, reason, Count(documents=1, bytes=document.size))
        order = hash_number(text_hash(document.text))
        text = document.text[:CHARACTERS_SHOWN]
        self.examples.append(Example(step=step, reason=reason, where=document.where, text=text, order=order))
        if len(self.examples) > 100 * EXAMPLES_KEPT:
            self.examples = _kept(self.examples)

    def kept(self, document: Document) -> None:
        """A document came through all steps."""
        size = document.size
        code = document.language or "unknown"
        self.languages[code] = self.languages.get(code, Count()) + Count(documents=1, bytes=size)
        exponent = size.bit_length()
        self.lengths[exponent] = self.lengths.get(exponent, 0) + 1

    def reject(self, step: str, reason: str, count: Count) -> None:
        reasons = self.rejected.setdefault(step, {})
        reasons[reason] = reasons.get(reason, Count()) + count

    def account(self) -> Cleaning:
        return Cleaning(
            after=self.after,
            rejected={step: dict(sorted(reasons.items())) for step, reasons in self.rejected.items()},
            languages=dict(sorted(self.languages.items())),
            lengths=dict(sorted(self.lengths.items())),
            examples=_kept(self.examples),
        )


class SplitCount(Record):
    """What a shard gives to one split."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    reference_tokens: int = 0  # of the reference tokenizer, if there is one; without end-of-sentence tokens

    def __add__(self, other: "SplitCount") -> "SplitCount":
        return SplitCount(**{name: getattr(self, name) + getattr(other, name) for name in SplitCount.model_fields})


class Encoding(Record):
    """A shard's account of the encoding, by split."""

    splits: dict[str, SplitCount]
    lengths: dict[int, int] = Field(default_factory=dict)  # documents of 2^(k−1) … 2^k − 1 tokens, by k


class _Order(NamedTuple):
    step: str
    reason: str
    order: int
    where: str


def _kept(examples: list[Example]) -> list[Example]:
    """The few of each step and reason whose hashes are the smallest."""
    found: dict[tuple[str, str], int] = {}
    kept = []
    for example in sorted(
        examples, key=lambda example: _Order(example.step, example.reason, example.order, example.where)
    ):
        seen = found.get((example.step, example.reason), 0)
        if seen < EXAMPLES_KEPT:
            found[example.step, example.reason] = seen + 1
            kept.append(example)
    return kept

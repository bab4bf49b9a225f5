"""Token ids of a text, word by word, each word looked up where it was met before.

Most of what `tokenizers` takes for a text goes into cutting it and keeping track of the pieces, though few pieces are new. For the
byte-level BPE of `data.tokenizer.bpe`, and for DeepSeek's own, whose cuts are the same, one regular expression cuts the text here,
and the model of `tokenizers` encodes only the words that were not met before. English and code take a third of the time or less,
Chinese, whose runs seldom repeat, as much as before. The ids are the same, for BPE never merges across a cut.

A text is left to `tokenizers` as a whole where it has characters outside the Basic Multilingual Plane, characters that the running
Python's Unicode tables do not know, and those that no rule takes (control and format characters).
"""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path

from tokenizers import Tokenizer

from data.tokenizer.bpe import CHINESE_AND_KANA, DIGITS, WORDS
from data.tokenizer.folder import load_tokenizer

MOST_CHARACTERS = 1 << 20  # in all words that are remembered; about 50 bytes of memory each
MOST_ADDED = 64  # tokens that a text is searched for


class Words:
    """A tokenizer, and what it made of the words that it has met."""

    def __init__(self, tokenizer: Tokenizer, added: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._added = added  # tokens that `tokenizers` looks for before it cuts a text
        self._known = _Known(tokenizer)
        self._is_ordinary, self._cut = _patterns()

    @classmethod
    def of(cls, folder: Path) -> "Words | None":
        """The words of a tokenizer folder; None where it cuts by other rules."""
        return _words(folder, (folder / "tokenizer.json").stat().st_mtime_ns)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        if not self._is_ordinary(text) or any(token in text for token in self._added):
            ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return ids
        return list(chain.from_iterable(map(self._known.__getitem__, self._cut(text))))


class _Known(dict[str, list[int]]):
    """Token ids of words; those of a new word are found when it is asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._model = tokenizer.model
        self._size = 0  # characters of all words

    def __missing__(self, word: str) -> list[int]:
        if self._size > MOST_CHARACTERS:
            self.clear()
            self._size = 0
        spelt = word.encode().decode("latin-1").translate(ALPHABET)
        self[word] = ids = [token.id for token in self._model.tokenize(spelt)]
        self._size += len(word)
        return ids


def _alphabet() -> dict[int, str]:
    """The character that byte-level tokenizers write for each byte: its own where it is visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + place) for place, byte in enumerate(hidden)}


ALPHABET = _alphabet()


@lru_cache(maxsize=4)
def _words(folder: Path, modified: int) -> Words | None:
    """`Words.of`, once for each state of the file."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = [token["content"] for token in content["added_tokens"] if not token["special"]]
    normalizer = content["normalizer"] or {"type": "Sequence", "normalizers": []}
    if (
        content["model"]["type"] != "BPE"
        or content["model"].get("dropout")
        or normalizer != {"type": "Sequence", "normalizers": []}
        or not _cuts_alike(content["pre_tokenizer"])
        or len(added) > MOST_ADDED
    ):
        return None
    return Words(load_tokenizer(folder), added)


def _cuts_alike(pre_tokenizer: dict[str, object] | None) -> bool:
    """Whether a pre-tokenizer has DeepSeek-V3's rules, however their characters are escaped."""
    steps = (pre_tokenizer or {}).get("pretokenizers")
    if not isinstance(steps, list) or len(steps) != 4:
        return False
    rules = [step.get("pattern", {}).get("Regex", "") for step in steps[:3]]
    byte_level = steps[3]
    return (
        [_unescaped(rule) for rule in rules] == [_unescaped(rule) for rule in (DIGITS, CHINESE_AND_KANA, WORDS)]
        and all(step.get("behavior") == "Isolated" and not step.get("invert") for step in steps[:3])
        and byte_level.get("type") == "ByteLevel"
        and not byte_level["add_prefix_space"]
        and not byte_level["use_regex"]
    )


def _unescaped(rule: str) -> str:
    return rule.replace("\\r", "\r").replace("\\n", "\n").replace('\\"', '"')


@lru_cache(maxsize=1)
def _patterns() -> tuple[Callable[[str], object], Callable[[str], list[str]]]:
    """Two looks at a text: whether each of its characters is one that some rule takes, and its words.

    `tokenizers` applies three rules one after the other, each to the pieces that the one before has left: digits, Chinese and
    kana, words. In one expression, the classes are therefore split into what is Chinese or kana and what is not, and white space
    that no word takes ends where digits or Chinese begin, as it does at the end of a text.
    """
    of_class: dict[str, list[int]] = {name: [] for name in "LMNPSZ"}
    of_chinese: dict[str, list[int]] = {name: [] for name in "LMPS"}
    is_chinese = re.compile(CHINESE_AND_KANA).match
    for code in range(0x10000):
        name = unicodedata.category(chr(code))[0]
        if name in of_class:
            (of_chinese if is_chinese(chr(code)) else of_class)[name].append(code)
    letters, marks, digits, punctuation, symbols, blanks = map(_ranges, of_class.values())
    chinese_letters, chinese_marks, chinese_punctuation, chinese_symbols = map(_ranges, of_chinese.values())
    chinese_words = f"{chinese_letters}{chinese_marks}"
    chinese_signs = f"{chinese_punctuation}{chinese_symbols}"
    blanks += r"\t"
    spaces = blanks + r"\r\n"
    rules = (
        f"[{digits}]{{1,3}}",
        f"[{chinese_words}]+",
        f"[{chinese_signs}]+",
        r"[!-/:-@\[-`{-~][A-Za-z]+",
        f"[{blanks}{marks}]?[{letters}{marks}]+",
        f" ?[{punctuation}{symbols}]+[\\r\\n]*",
        f"[{spaces}]*[\\r\\n]+",
        f"[{spaces}]+(?![{letters}{marks}{punctuation}{symbols}])",
        f"[{spaces}]+",
    )
    every = f"[{chinese_words}{chinese_signs}{letters}{marks}{digits}{punctuation}{symbols}{spaces}]*"
    return re.compile(every).fullmatch, re.compile("|".join(rules)).findall


def _ranges(codes: Sequence[int]) -> str:
    """Code points in rising order as the inside of a character class."""
    starts = [code for before, code in pairwise([-2, *codes]) if code != before + 1]
    ends = [code for code, after in pairwise([*codes, 1 << 21]) if after != code + 1]
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in zip(starts, ends))

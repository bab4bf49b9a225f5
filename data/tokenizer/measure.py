"""How much text tokens stand for: bytes of each token, and one tokenizer held against another."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.tokenizer.folder import decode, encode, load_tokenizer, vocab_size


def token_bytes(folder: Path) -> npt.NDArray[np.int64]:
    """UTF-8 bytes that each id stands for [V]; 0 for special tokens and for ids without a token."""
    tokenizer = load_tokenizer(folder)
    lengths = np.zeros(vocab_size(folder), np.int64)
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    steps = {step["type"] for step in decoder.get("decoders", [decoder]) if "type" in step}
    byte_level = "ByteLevel" in steps
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if byte_level:  # one character of the alphabet a byte
            lengths[number] = len(token)
        elif "ByteFallback" in steps and len(token) == 6 and token.startswith("<0x"):
            lengths[number] = 1
        else:
            lengths[number] = len(token.replace("▁", " ").encode())
    for number, added in tokenizer.get_added_tokens_decoder().items():
        lengths[number] = 0 if added.special else len(added.content.encode())
    if (unknown := tokenizer.token_to_id("<unk>")) is not None:
        lengths[unknown] = 0
    return lengths


def evaluate_tokenizer(
    folder: Path | str, files: Sequence[Path | str], reference: Path | str | None = None
) -> dict[str, Any]:
    """How a tokenizer does on text files.

    Returns:
        vocab_size, and in all and for each file under `files`: bytes, tokens, bytes_per_token, exact (decoding gives the
        text back). With a reference, another tokenizer's folder, also its bytes_per_token, as `reference`, and how many
        tokens it needs for one of ours, as `ratio`: above 1 where it needs more.

    Raises:
        DataError: a folder holds no tokenizer, or a file is no UTF-8 text.
    """
    folder = Path(folder)
    counts = {str(path): _count(_read_text(Path(path)), folder, reference) for path in files}
    total = _Counts(*(sum(values) for values in zip(*counts.values()))) if counts else _Counts(0, 0, 0, 0)
    return {
        "vocab_size": vocab_size(folder),
        **_as_result(total, len(counts), reference is not None),
        "files": {path: _as_result(each, 1, reference is not None) for path, each in counts.items()},
    }


class _Counts(NamedTuple):
    """Of one file, or of several."""

    bytes: int
    tokens: int
    reference_tokens: int
    exact: int  # files that decoding gives back


def _count(text: str, folder: Path, reference: Path | str | None) -> _Counts:
    ids = encode(folder, [text])[0]
    other = [] if reference is None else encode(Path(reference), [text])[0]
    return _Counts(len(text.encode()), len(ids), len(other), decode(folder, ids) == text)


def _as_result(counts: _Counts, files: int, with_reference: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"bytes": counts.bytes, "tokens": counts.tokens}
    result["bytes_per_token"] = counts.bytes / max(counts.tokens, 1)
    if with_reference:
        result["reference"] = counts.bytes / max(counts.reference_tokens, 1)
        result["ratio"] = counts.reference_tokens / max(counts.tokens, 1)
    result["exact"] = counts.exact == files
    return result


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a text file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None

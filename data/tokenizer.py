"""Tokenizers: trained here or taken from a folder, always kept as a Hugging Face tokenizer folder.

Byte-level BPE cuts text by DeepSeek-V3's rules before it merges: digits in groups of up to three, runs of Chinese
characters and kana, then punctuation, letters and white space. The sentencepiece kind is a unigram model with byte fallback
that leaves the text as it is. Both give every text back exactly (sentencepiece: but for U+2581, its mark for a space).

`tokenizer_config.json` names the class `PreTrainedTokenizerFast`, which `transformers` 4 and 5 both know.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data.errors import DataError
from data.files import replace_file

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"  # fill-in-the-middle
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END)  # ids 0 … 5

# The three cuts of DeepSeek-V3's tokenizer.json, in order.
DIGITS = r"\p{N}{1,3}"
CHINESE_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"  # one ASCII mark and the letters after it
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"  # a word, with the space before it
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

FOLDER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE with DeepSeek-V3's pre-tokenizer and write its folder. The same texts give the same bytes.

    Raises:
        DataError: the texts hold too few different words for `vocab_size` tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in (DIGITS, CHINESE_AND_KANA, WORDS)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise DataError(
            f"tokenizer.vocab_size = {vocab_size}: the text yields only {found} tokens; lower it, or add text"
        )
    content = json.loads(tokenizer.to_str())
    # Merges as strings are what every version of `tokenizers` reads; no byte-level token contains a space.
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    _write_folder(folder, content)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a sentencepiece unigram model and write it as a Hugging Face fast tokenizer.

    Raises:
        DataError: the texts hold too few different pieces for `vocab_size`.
    """
    import sentencepiece

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line),
            model_writer=written,
            model_type="unigram",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            # Whatever a special token or a byte piece is spelt with must also exist as characters: see `_unigram`.
            required_chars="".join(chr(code) for code in range(33, 127)) + "｜",
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
            bos_id=0,
            bos_piece=BOS,
            eos_id=1,
            eos_piece=EOS,
            pad_id=2,
            pad_piece=PAD,
            unk_id=len(SPECIAL_TOKENS),
            control_symbols=list(SPECIAL_TOKENS[3:]),
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"tokenizer.vocab_size = {vocab_size}: sentencepiece refuses it ({reason}); lower it, or add text"
        ) from None
    _write_folder(folder, json.loads(_unigram(written.getvalue()).to_str()))


def copy_folder(source: Path, folder: Path) -> None:
    """Copy a Hugging Face tokenizer folder.

    Raises:
        DataError: it has no `tokenizer.json`, one that cannot be read, or no end-of-sentence token.
    """
    _read(source)
    eos_token_id(source)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FOLDER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name, unknown to 4
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        _write_json(folder / "tokenizer_config.json", config)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer as training text needs it: special tokens in a text are spelt out, nothing is added, cut or padded."""
    path = folder / "tokenizer.json"
    return _load(folder, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(maxsize=4)
def _load(folder: Path, modified: int) -> Tokenizer:
    """`load_tokenizer`, once for each state of the file."""
    tokenizer = _read(folder)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without end-of-sentence tokens."""
    return [
        encoding.ids for encoding in load_tokenizer(folder).encode_batch_fast(list(texts), add_special_tokens=False)
    ]


def decode(folder: Path, ids: Sequence[int]) -> str:
    """The text that token ids stand for, special tokens included."""
    return load_tokenizer(folder).decode(list(ids), skip_special_tokens=False)


def vocab_size(folder: Path) -> int:
    """Number of ids, special tokens included: the highest id plus one."""
    return max(load_tokenizer(folder).get_vocab(with_added_tokens=True).values()) + 1


def eos_token_id(folder: Path) -> int:
    """Id of the end-of-sentence token that `tokenizer_config.json` names."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        raise DataError(f"{path}: missing; a tokenizer folder needs it; save the tokenizer with save_pretrained")
    token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    token = token["content"] if isinstance(token, dict) else token
    found = None if token is None else load_tokenizer(folder).token_to_id(token)
    if found is None:
        raise DataError(
            f"{path}: eos_token = {token!r}: must be a token of the vocabulary, since it ends every document; set it"
        )
    return found


def fingerprint(folder: Path) -> str:
    """sha256 of what `tokenizer.json` makes of a text: not of its layout, nor of what is added around the text."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for setting in ("truncation", "padding", "post_processor"):
        content.pop(setting, None)
    model = content["model"]
    if "merges" in model:  # two spellings: "a b" and ["a", "b"]
        model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if isinstance(model["vocab"], list):  # of a unigram model: reading and writing moves a score's last digit
        model["vocab"] = [[piece, round(score, 6)] for piece, score in model["vocab"]]
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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


def evaluate_tokenizer(folder: Path | str, files: Sequence[Path | str]) -> dict[str, Any]:
    """How a tokenizer does on text files.

    Returns:
        vocab_size, and in all and for each file under `files`: bytes, tokens, bytes_per_token, exact (decoding gives the
        text back).

    Raises:
        DataError: the folder holds no tokenizer, or a file is no UTF-8 text.
    """
    folder = Path(folder)
    results: dict[str, dict[str, Any]] = {}
    for path in map(Path, files):
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give a text file") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
        ids = encode(folder, [text])[0]
        size = len(text.encode())
        results[str(path)] = {
            "bytes": size,
            "tokens": len(ids),
            "bytes_per_token": size / max(len(ids), 1),
            "exact": decode(folder, ids) == text,
        }
    size, count = (sum(result[key] for result in results.values()) for key in ("bytes", "tokens"))
    exact = all(result["exact"] for result in results.values())
    return {
        "vocab_size": vocab_size(folder),
        "bytes": size,
        "tokens": count,
        "bytes_per_token": size / max(count, 1),
        "exact": exact,
        "files": results,
    }


def _unigram(model: bytes) -> Tokenizer:
    """A sentencepiece unigram model as a fast tokenizer with the same ids."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    scores = [piece.score for piece in proto.pieces if piece.type == piece.NORMAL]
    # `tokenizers` also matches special and byte pieces in the text itself. A score worse than any path over single
    # characters keeps "<0x0A>" written in a text from becoming a line feed.
    never = 100 * min(scores)
    vocabulary = [(piece.piece, piece.score if piece.type == piece.NORMAL else never) for piece in proto.pieces]
    unknown = next(number for number, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN)
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def _write_folder(folder: Path, content: dict[str, Any]) -> None:
    """Write the three files of a tokenizer folder."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    _write_json(folder / "tokenizer.json", content)
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", named)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _read(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{folder}: has no tokenizer.json, so it is no fast tokenizer; load it with AutoTokenizer and save it with "
            f"save_pretrained, or train one with `rorqual tokenizer train RECIPE --out {folder}`"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise DataError(
            f"{path}: cannot be read as a tokenizer ({' '.join(str(error).split())}); save it again"
        ) from None

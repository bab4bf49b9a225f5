"""A Hugging Face tokenizer folder: written, copied, read, and used.

`tokenizer_config.json` names the class `PreTrainedTokenizerFast`, which `transformers` 4 and 5 both know.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from data.errors import DataError
from data.files import replace_file

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"  # fill-in-the-middle
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END)  # ids 0 … 5

CONFIG = "tokenizer_config.json"
FOLDER_FILES = (
    "tokenizer.json",
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def copy_folder(source: Path, folder: Path) -> None:
    """Copy a Hugging Face tokenizer folder.

    Raises:
        DataError: it has no `tokenizer.json`, one that cannot be read, or no end-of-sentence token.
    """
    eos_token_id(source)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FOLDER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = _config(folder)
    if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name, unknown to 4
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        _write_json(folder / CONFIG, config)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer as training text needs it: special tokens in a text are spelt out, nothing is added, cut or padded."""
    path = folder / "tokenizer.json"
    return _load(folder, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(maxsize=4)
def _load(folder: Path, modified: int) -> Tokenizer:
    """`load_tokenizer`, once for each state of the file."""
    tokenizer = _read(folder)
    # DeepSeek's own files do not call the tokens of fill-in-the-middle special, and a text could then hold them.
    present = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in present])
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
    token = _config(folder).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = load_tokenizer(folder).token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise DataError(
            f"{folder / CONFIG}: eos_token = {token!r:.60}: must be a token of the vocabulary, since it ends every document; set it"
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


def write_folder(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the three files of a tokenizer folder."""
    content = json.loads(tokenizer.to_str())
    if merges := content["model"].get("merges"):
        # Merges as strings are what every version of `tokenizers` reads; no token of ours contains a space.
        content["model"]["merges"] = [" ".join(pair) for pair in merges]
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
    _write_json(folder / CONFIG, config)
    _write_json(folder / "special_tokens_map.json", named)


def _config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`."""
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(f"{path}: missing; a tokenizer folder needs it; save the tokenizer with save_pretrained")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no JSON ({str(error).splitlines()[0]}); save the tokenizer again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be a mapping of keys to values; save the tokenizer again")
    return content


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
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:  # `tokenizers` raises bare Exception, and where it panics no Exception at all
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read as a tokenizer ({reason:.200}); save it again") from None
    if not tokenizer.get_vocab_size():
        raise DataError(f"{path}: has no tokens; save it again")
    return tokenizer

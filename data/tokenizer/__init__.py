"""Tokenizers: trained here or taken from a folder, always kept as a Hugging Face tokenizer folder."""

from data.tokenizer.bpe import train_bpe
from data.tokenizer.folder import (
    BOS,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    PAD,
    SPECIAL_TOKENS,
    copy_folder,
    decode,
    encode,
    eos_token_id,
    fingerprint,
    load_tokenizer,
    vocab_size,
)
from data.tokenizer.measure import evaluate_tokenizer, token_bytes
from data.tokenizer.pieces import train_sentencepiece

__all__ = [
    "BOS",
    "EOS",
    "FIM_BEGIN",
    "FIM_END",
    "FIM_HOLE",
    "PAD",
    "SPECIAL_TOKENS",
    "copy_folder",
    "decode",
    "encode",
    "eos_token_id",
    "evaluate_tokenizer",
    "fingerprint",
    "load_tokenizer",
    "token_bytes",
    "train_bpe",
    "train_sentencepiece",
    "vocab_size",
]

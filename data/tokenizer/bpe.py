"""Byte-level BPE that cuts text by DeepSeek-V3's rules before it merges.

Digits in groups of up to three, runs of Chinese characters and kana, then punctuation with the line breaks after it, letters and
white space. Every text comes back exactly.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.errors import DataError
from data.tokenizer.folder import SPECIAL_TOKENS, write_folder

# The three cuts of DeepSeek-V3's tokenizer.json, in order.
DIGITS = r"\p{N}{1,3}"
CHINESE_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"  # one ASCII mark and the letters after it
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"  # a word, with the space before it
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
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
    write_folder(folder, tokenizer)

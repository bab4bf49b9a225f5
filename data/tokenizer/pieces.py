"""sentencepiece models, unigram and BPE, as Hugging Face fast tokenizers.

They leave the text as it is, spell with bytes what they have no piece for, and give every text back exactly, but for U+2581,
their mark for a space. `tokenizer.model` is sentencepiece's own file, for programs that read that.

A fast BPE has the ids of sentencepiece. So has a fast unigram model, but where two ways to cut a text are equally likely within
the rounding of sentencepiece's 32-bit sums: `tokenizers` adds 64-bit numbers and takes the likelier one.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from data.errors import DataError
from data.files import replace_file
from data.tokenizer.folder import BOS, EOS, PAD, SPECIAL_TOKENS, write_folder


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, folder: Path, model: Literal["unigram", "bpe"] = "unigram"
) -> None:
    """Train a sentencepiece model and write it as a Hugging Face fast tokenizer. The same texts give the same bytes.

    Raises:
        DataError: the texts hold too few different pieces for `vocab_size`.
    """
    import sentencepiece

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line),
            model_writer=written,
            model_type=model,
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
    write_folder(folder, fast_tokenizer(written.getvalue()))
    with replace_file(folder / "tokenizer.model") as temporary:
        temporary.write_bytes(written.getvalue())


def fast_tokenizer(model: bytes) -> Tokenizer:
    """A trained sentencepiece model, as `train_sentencepiece` trains it, as a fast tokenizer."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
    tokenizer = Tokenizer(_bpe(proto) if is_bpe else _unigram(proto))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def _bpe(proto: Any) -> models.BPE:
    """Merges in the order in which sentencepiece prefers them.

    sentencepiece joins any two neighbours whose concatenation is a piece, the one with the best score first. So every way to
    cut a piece into two pieces is a merge, ranked by the score of the piece that it makes.
    """
    numbers = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    best_first = sorted(scores, key=lambda piece: (-scores[piece], numbers[piece]))
    merges = [
        (piece[:cut], piece[cut:])
        for piece in best_first
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return models.BPE(numbers, merges, unk_token=proto.pieces[_unknown(proto)].piece, byte_fallback=True)


def _unigram(proto: Any) -> models.Unigram:
    """Pieces with their scores."""
    # `tokenizers` also matches special and byte pieces in the text itself. A score worse than any path over single
    # characters keeps "<0x0A>" written in a text from becoming a line feed.
    never = 100 * min(piece.score for piece in proto.pieces if piece.type == piece.NORMAL)
    vocabulary = [(piece.piece, piece.score if piece.type == piece.NORMAL else never) for piece in proto.pieces]
    return models.Unigram(vocabulary, unk_id=_unknown(proto), byte_fallback=True)


def _unknown(proto: Any) -> int:
    """Id of what stands for nothing else; with byte fallback it never appears."""
    return next(number for number, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN)

"""From text to tokens: fill-in-the-middle and split tokens, drawn by what a document says and by nothing else."""

import random
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from data.documents import text_hash
from data.errors import DataError
from data.fim import Encoder, JoinedTokens, fim_cuts
from data.tokenizer import (
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    SPECIAL_TOKENS,
    copy_folder,
    decode,
    encode,
    train_bpe,
    train_sentencepiece,
)

MARKS = (FIM_BEGIN, FIM_HOLE, FIM_END)
SNIPPETS = (
    "void f() {\n  return g(x);\n}\n\n",
    '"Call me Ishmael."\n',
    "他说：“好。”\n\n北冥有魚，其名為鯤。\r\n",
    "👩‍🚀🇨🇭 e\u0301 नमस्ते!\n",
    "a, b;\n\nc: d\n",
    "𝔘𝔫𝔦 ﬁ\t\t(x)\n",
)


def some_text(documents=400):
    draw = random.Random(0)
    return ["".join(draw.choices(SNIPPETS, k=draw.randint(1, 12))) + str(n) for n in range(documents)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fim") / "tokenizer"
    train_bpe(
        [*some_text(200), *(f"{a}{b}{c}" for a in "(){};:.,。！" for b in ('"', ")", "") for c in ("\n", "\n\n"))],
        400,
        folder,
    )
    return folder


def encoded(folder, texts, plain=None, **rates):
    plain = [False] * len(texts) if plain is None else plain
    return Encoder(folder, **rates).encode(texts, [text_hash(text) for text in texts], plain)


def test_a_document_is_written_prefix_suffix_middle(folder):
    # Seed 0 draws the cuts 5 and 11 of this text's 13 characters: "fn ma" | "in() {" | "}\n".
    text = "fn main() {}\n"
    assert fim_cuts(text, text_hash(text), rate=1.0, seed=0) == (5, 11)
    ids = encoded(folder, [text], fim_rate=1.0)[0]
    assert decode(folder, ids) == f"{FIM_BEGIN}fn ma{FIM_HOLE}}}\n{FIM_END}in() {{{EOS}"
    prefix, suffix, middle = encode(folder, ["fn ma", "}\n", "in() {"])
    assert ids.tolist() == [4, *prefix, 3, *suffix, 5, *middle, 1]


def test_without_rates_documents_are_what_the_tokenizer_makes_of_them(folder):
    texts = [*some_text(60), ""]
    expected = [[*ids, 1] for ids in encode(folder, texts)]
    found = encoded(folder, texts)
    assert [ids.tolist() for ids in found] == expected
    assert {ids.dtype for ids in found} == {np.dtype(np.uint16)}
    assert encoded(folder, []) == []


def test_documents_that_are_to_stay_plain_do(folder):
    texts = some_text(60)
    plain = [number % 2 == 0 for number in range(60)]
    found = encoded(folder, texts, plain, fim_rate=1.0, split_joined_rate=1.0)
    for ids, before, left in zip(found, encoded(folder, texts), plain):
        assert (ids.tolist() == before.tolist()) == left


def test_every_text_is_put_together_again_from_its_three_parts(folder):
    texts = ["", "x", "🇨🇭", *some_text(600)]
    empty = set()
    for text, ids in zip(texts, encoded(folder, texts, fim_rate=1.0, split_joined_rate=0.5)):
        begin, rest = decode(folder, ids).split(FIM_BEGIN)
        prefix, rest = rest.split(FIM_HOLE)
        suffix, rest = rest.split(FIM_END)
        middle, end = rest.split(EOS)
        assert (begin, end) == ("", "")
        assert prefix + middle + suffix == text
        empty |= {name for name, part in (("prefix", prefix), ("middle", middle), ("suffix", suffix)) if not part}
    assert empty == {"prefix", "middle", "suffix"}


def test_as_many_documents_are_transformed_as_the_rate_says_and_cuts_are_uniform():
    texts = [f"{number:0100d}" for number in range(4000)]
    cuts = [fim_cuts(text, text_hash(text), rate=0.1, seed=3) for text in texts]
    chosen = [pair for pair in cuts if pair is not None]
    low, high = binom.interval(0.9999, 4000, 0.1)
    assert low <= len(chosen) <= high
    # Of two uniform places on 0 … n the lower lies at n/3 on the average, the higher at 2n/3, with n/√18 for deviation.
    for place, expected in zip(np.mean(chosen, axis=0), (100 / 3, 200 / 3)):
        assert abs(place - expected) < 4 * 100 / np.sqrt(18 * len(chosen))
    assert min(first for first, _ in chosen) <= 2 and max(last for _, last in chosen) >= 98
    assert cuts != [fim_cuts(text, text_hash(text), rate=0.1, seed=4) for text in texts]


def test_tokens_do_not_depend_on_what_is_encoded_with_them(folder):
    texts = some_text(80)
    rates = {"fim_rate": 0.5, "split_joined_rate": 0.5, "seed": 7}
    together = encoded(folder, texts, **rates)
    alone = [encoded(folder, [text], **rates)[0] for text in texts]
    backwards = encoded(folder, texts[::-1], **rates)[::-1]
    large = encoded(folder, [*texts, "x " * 150_000, *texts], **rates)[-80:]  # more than one batch of the library
    for others in (alone, backwards, large):
        assert all(np.array_equal(one, other) for one, other in zip(together, others))


def test_joined_tokens_are_split_at_the_rate_and_spell_the_same_text(folder):
    texts = some_text()
    joined = JoinedTokens.of(folder)
    assert {".\n", ")\n\n", "。\n\n", " {\n"} & {decode(folder, [number]) for number in joined.halves}
    whole = encoded(folder, texts)
    before = sum(np.isin(ids, list(joined.halves)).sum() for ids in whole)
    for rate in (0.1, 1.0):
        split = encoded(folder, texts, split_joined_rate=rate)
        assert all(decode(folder, ids) == decode(folder, others) for ids, others in zip(split, whole))
        after = sum(np.isin(ids, list(joined.halves)).sum() for ids in split)
        low, high = binom.interval(0.9999, before, rate)
        assert low <= before - after <= high and before > 500


def test_a_token_is_split_between_its_punctuation_and_its_line_breaks(folder):
    joined = JoinedTokens.of(folder)
    for number, ids in joined.halves.items():
        text = decode(folder, [number])
        punctuation = text.rstrip("\r\n")
        assert ids == [
            number for half in (punctuation, text[len(punctuation) :]) for number in encode(folder, [half])[0]
        ]
    # Two runs, [1 2 1] and [2 2], of a vocabulary of 4, where 2 falls into 0, 3 and 3.
    toy = JoinedTokens({2: [0, 3, 3]}, np.array([1, 1, 3, 1]))
    tokens, counts = toy.split(np.array([1, 2, 1, 2, 2]), np.array([3, 2]), np.zeros(2, np.uint64), np.ones(2))
    assert tokens.tolist() == [1, 0, 3, 3, 1, 0, 3, 3, 0, 3, 3] and counts.tolist() == [5, 6]


def test_a_long_text_is_sliced_where_its_tokens_do_not_change(folder, monkeypatch):
    monkeypatch.setattr("data.fim.MOST_CHARACTERS", 2000)
    lines = "\n\n".join(some_text(300))
    words = " ".join(["whale", "été", "крот"] * 1000)
    for text in (lines, words):
        assert encoded(folder, [text])[0].tolist() == [*encode(folder, [text])[0], 1]
    endless = "¶!" * 3000 + "🐋"
    assert decode(folder, encoded(folder, [endless])[0]) == endless + EOS


def test_sentencepiece_joins_nothing_that_could_be_split(tmp_path):
    texts = some_text(60)
    train_sentencepiece([*texts, Path(random.__file__).read_text(encoding="utf-8")], 500, tmp_path)
    assert JoinedTokens.of(tmp_path).halves == {}
    for text, ids in zip(texts, encoded(tmp_path, texts, fim_rate=1.0, split_joined_rate=1.0)):
        begin, hole, end = (int(np.flatnonzero(ids == SPECIAL_TOKENS.index(mark))[0]) for mark in MARKS)
        assert begin == 0 and ids[-1] == 1
        prefix, suffix, middle = ids[1:hole], ids[hole + 1 : end], ids[end + 1 : -1]
        assert decode(tmp_path, [*prefix, *middle, *suffix]) == text


def test_a_tokenizer_without_the_tokens_of_fim_is_refused(folder, tmp_path):
    copy_folder(folder, tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace(FIM_END, "<nothing>"), encoding="utf-8")
    Encoder(tmp_path, split_joined_rate=0.1)
    with pytest.raises(
        DataError, match=r"fim_rate = 0.1: the tokenizer .* has no token <｜fim▁end｜>; set fim_rate: 0"
    ):
        Encoder(tmp_path, fim_rate=0.1)

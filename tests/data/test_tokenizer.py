"""Tokenizers of both libraries: exact round trips, DeepSeek's cuts, and folders that transformers loads."""

import argparse
import json
import random
import textwrap
from functools import partial
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.errors import DataError
from data.tokenizer import (
    BOS,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    copy_folder,
    decode,
    encode,
    eos_token_id,
    evaluate_tokenizer,
    fingerprint,
    load_tokenizer,
    token_bytes,
    train_bpe,
    train_sentencepiece,
    vocab_size,
)

ODD_TEXTS = {
    "nothing": "",
    "spaces": "  two  and   three ",
    "tabs and line ends": "\t\tx = 1\r\n\r\n\ty\n\n\n",
    "emoji": "🐋🐳 👩‍🚀 flags 🇨🇭",
    "Chinese and Japanese": "北冥有魚，其名為鯤。くじらはクジラ目。",
    "combining marks": "e\u0301 é ﬁ Å नमस्ते",
    "unusual spaces": "a\u00a0b\u3000c\u200bd\ufeff",
    "control characters": "\x00\x01\x7f",
    "digits": "1234567 1,000,000 3.14159",
    "what looks like a byte token": "<0x0A> <s> </s> <unk> <<0x41>>",
    "outside the BMP": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
}


def some_text(documents=150):
    words = random.Random(0)
    vocabulary = ["".join(words.choices("abcdefghilmnorstu", k=words.randint(2, 7))) for _ in range(150)]
    return [" ".join(words.choices(vocabulary, k=60)) + f"\n{words.randint(0, 9999)}." for _ in range(documents)]


KINDS = {
    "bpe": train_bpe,
    "sentencepiece_unigram": train_sentencepiece,
    "sentencepiece_bpe": partial(train_sentencepiece, model="bpe"),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "tokenizer"
    KINDS[request.param](some_text(), 450, folder)
    return folder


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe_only")
    train_bpe(some_text(), 450, folder)
    return folder


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_any_text_comes_back_exactly_with_its_bytes_counted(folder, name):
    text = ODD_TEXTS[name]
    ids = encode(folder, [text])[0]
    assert decode(folder, ids) == text
    assert token_bytes(folder)[ids].sum() == len(text.encode())


def test_special_tokens_come_first_and_text_never_becomes_one(folder):
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(6))
    assert eos_token_id(folder) == 1
    assert vocab_size(folder) == 450
    ids = encode(folder, [f"a{EOS}b{BOS} c {SPECIAL_TOKENS[3]}"])[0]
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert (token_bytes(folder)[:6] == 0).all()


def test_text_never_becomes_a_token_of_fill_in_the_middle_that_a_file_calls_ordinary(bpe, tmp_path):
    copy_folder(bpe, tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["special"] = token["content"] in (BOS, EOS, PAD)  # as in DeepSeek's own
    path.write_text(json.dumps(content), encoding="utf-8")
    assert min(encode(tmp_path, ["".join(SPECIAL_TOKENS)])[0]) >= len(SPECIAL_TOKENS)
    assert (token_bytes(tmp_path)[:6] == 0).all()


@pytest.mark.parametrize("load", [AutoTokenizer.from_pretrained, PreTrainedTokenizerFast.from_pretrained])
def test_transformers_loads_the_folder_and_gives_the_same_ids(folder, load):
    tokenizer = load(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert len(tokenizer) == 450
    for text in [*ODD_TEXTS.values(), *some_text(3)]:
        assert tokenizer(text)["input_ids"] == encode(folder, [text])[0]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_older_consumers_find_what_they_know(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == 450
    merges = json.loads((folder / "tokenizer.json").read_text())["model"].get("merges", [])
    assert all(isinstance(merge, str) for merge in merges)


def test_a_folder_saved_by_transformers_is_taken_with_the_same_fingerprint(folder, tmp_path):
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    copy_folder(tmp_path / "saved", tmp_path / "copied")
    text = ODD_TEXTS["Chinese and Japanese"] + some_text(1)[0]
    assert encode(tmp_path / "copied", [text]) == encode(folder, [text])
    assert fingerprint(tmp_path / "copied") == fingerprint(folder)
    assert (
        json.loads((tmp_path / "copied" / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )


@pytest.mark.parametrize("train", KINDS.values(), ids=KINDS)
def test_training_is_deterministic(train, tmp_path):
    for name in ("one", "two"):
        train(some_text(60), 400, tmp_path / name)
    one, two = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two"))
    assert one == two


# The beginning of Zhuangzi, about a fish that becomes a bird.
CHINESE = (
    "北冥有魚，其名為鯤。鯤之大，不知其幾千里也。化而為鳥，其名為鵬。鵬之背，不知其幾千里也；怒而飛，其翼若垂天之雲。"
    "是鳥也，海運則將徙於南冥。南冥者，天池也。\n齊諧者，志怪者也。諧之言曰：「鵬之徙於南冥也，水擊三千里，摶扶搖而上者九萬里。」\n"
)


def real_texts():
    """Prose with leading spaces, code with tabs, Chinese, emoji, and what is odd about text."""
    modules = [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, random, textwrap)]
    return [*modules, CHINESE, CHINESE.replace("，", " "), "\tif x:\n\t\treturn\n" * 3, *ODD_TEXTS.values()]


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_a_fast_tokenizer_has_the_ids_of_sentencepiece(model, tmp_path):
    train_sentencepiece(real_texts(), 1000, tmp_path, model=model)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    lines = [line for text in real_texts() for line in text.splitlines(keepends=True)]
    texts = [*real_texts(), *lines]
    differing = [pair for pair in zip(encode(tmp_path, texts), processor.encode(texts)) if pair[0] != pair[1]]
    if model == "bpe":
        assert not differing
    # Of two paths that are equally likely within the rounding of 32-bit sums, sentencepiece may take the other one.
    assert len(differing) < len(texts) / 500
    for pair in differing:
        ours, theirs = (sum(map(processor.get_score, ids)) for ids in pair)
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_text_is_cut_as_deepseek_v3_cuts_it(bpe):
    cut = load_tokenizer(bpe).pre_tokenizer.pre_tokenize_str
    pieces = [piece for piece, _ in cut("Call 123456 whales, it's é.foo()\n\n  x")]
    assert pieces == ["Call", "Ġ", "123", "456", "Ġwhales", ",", "Ġit", "'s", "ĠÃ©", ".foo", "()ĊĊ", "Ġ", "Ġx"]
    assert len(cut("くじらは鯨である")) == 1  # kana and Chinese characters make one run


def test_the_fingerprint_sees_a_change_of_the_vocabulary_only(bpe, tmp_path):
    copy_folder(bpe, tmp_path)
    before = fingerprint(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
    content["padding"] = {"strategy": "BatchLongest"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert fingerprint(tmp_path) == before
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert fingerprint(tmp_path) != before


def test_a_folder_that_changes_is_read_again(tmp_path):
    for size in (300, 400):
        train_bpe(some_text(), size, tmp_path)
        assert vocab_size(tmp_path) == size


def test_evaluation_counts_bytes_and_tokens(folder, tmp_path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, text in zip(files, ("déjà vu\r\n", some_text(1)[0])):
        file.write_bytes(text.encode())
    result = evaluate_tokenizer(folder, files)
    assert result["exact"] and result["vocab_size"] == 450
    assert result["bytes"] == sum(file.stat().st_size for file in files)
    assert result["tokens"] == sum(each["tokens"] for each in result["files"].values())
    assert result["bytes_per_token"] == result["bytes"] / result["tokens"]


def test_a_tokenizer_is_held_against_a_reference(bpe, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("whale " * 50)
    small = tmp_path / "small"
    train_bpe(some_text(60), 300, small)
    result = evaluate_tokenizer(bpe, [file], reference=small)
    ours, theirs = (len(encode(each, [file.read_text()])[0]) for each in (bpe, small))
    assert result["bytes_per_token"] == 300 / ours  # "whale " has 6 bytes
    assert result["reference"] == 300 / theirs
    assert result["ratio"] == pytest.approx(result["bytes_per_token"] / result["reference"])
    assert result["files"][str(file)]["ratio"] == result["ratio"]


def test_what_is_no_tokenizer_is_refused(tmp_path, bpe):
    with pytest.raises(DataError, match=r"has no tokenizer.json, so it is no fast tokenizer; "):
        evaluate_tokenizer(tmp_path, [])
    copy_folder(bpe, tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json: cannot be read as a tokenizer"):
        vocab_size(tmp_path / "broken")
    copy_folder(bpe, tmp_path / "endless")
    (tmp_path / "endless" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"eos_token = None: must be a token of the vocabulary"):
        copy_folder(tmp_path / "endless", tmp_path / "copy")
    with pytest.raises(DataError, match=r"missing.txt: cannot be read"):
        evaluate_tokenizer(bpe, [tmp_path / "missing.txt"])


@pytest.mark.parametrize("train", KINDS.values(), ids=KINDS)
def test_more_tokens_than_the_text_yields_is_refused(train, tmp_path):
    with pytest.raises(DataError, match=r"tokenizer.vocab_size = 30000: .* lower it, or add text") as error:
        train(some_text(20), 30_000, tmp_path / "tokenizer")
    assert "\n" not in str(error.value)

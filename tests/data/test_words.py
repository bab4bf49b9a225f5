"""Words looked up one by one give the ids of `tokenizers`, for every text."""

import argparse
import json
import random
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers

from data.tokenizer import copy_folder, load_tokenizer, train_bpe, train_sentencepiece
from data.tokenizer.bpe import CHINESE_AND_KANA, DIGITS, WORDS
from data.tokenizer.words import Words, _patterns

CODE = Path(argparse.__file__).read_text(encoding="utf-8")
CHINESE = "北冥有魚，其名為鯤。鯤之大，不知其幾千里也。化而為鳥，其名為鵬。くじらはクジラ目。\n"
PARTS = [*"  \t\n\r'\".,_(){}-·—。，！（＋ab1２Ⅷéनﬁ北冥くカー・゛\u3000\u2028\u0301", "e\u0301", "don't", "\r\n"]
LEFT = [*"🐋\x00\u200b\ufeff\x85\x0b𝔘\ue000\uffff"]  # one of them makes a text one for the library


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    train_bpe([CODE, CHINESE * 20], 1000, folder)
    return folder


def library(folder, texts):
    return [each.ids for each in load_tokenizer(folder).encode_batch_fast(texts, add_special_tokens=False)]


def mixed_texts(parts, count=3000):
    draw = random.Random(0)
    return ["".join(draw.choices(parts, k=draw.randint(0, 12))) for _ in range(count)]


def test_ids_are_those_of_the_library(folder):
    words = Words.of(folder)
    texts = [CODE, CHINESE, *CODE.splitlines(keepends=True), *mixed_texts(PARTS), *mixed_texts([*PARTS, *LEFT])]
    assert [words.encode(text) for text in texts] == library(folder, texts)


def test_every_character_is_cut_as_the_library_cuts_it():
    is_ordinary, cut = _patterns()
    rules = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in (DIGITS, CHINESE_AND_KANA, WORDS)]
    theirs = pre_tokenizers.Sequence(rules).pre_tokenize_str
    characters = [chr(code) for code in range(0x10000) if unicodedata.category(chr(code))[0] in "LMNPSZ"]
    assert len(characters) > 50_000 and all(map(is_ordinary, characters))
    for start in range(0, len(characters), 500):
        text = "".join(f"a{c}b {c}{c}1 {c}\n{c}中{c}. {c}  " for c in characters[start : start + 500])
        assert cut(text) == [piece for piece, _ in theirs(text)]


def test_texts_with_other_characters_are_left_to_the_library():
    is_ordinary, _ = _patterns()
    assert all(map(is_ordinary, PARTS))
    assert not any(map(is_ordinary, LEFT))


def test_what_is_forgotten_is_found_again(folder, monkeypatch):
    monkeypatch.setattr("data.tokenizer.words.MOST_CHARACTERS", 100)
    lines = CODE.splitlines(keepends=True)[:300]
    assert [Words(load_tokenizer(folder), ()).encode(line) for line in lines] == library(folder, lines)


def test_added_tokens_are_found_where_the_library_finds_them(folder, tmp_path):
    copy_folder(folder, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    added = dict(content["added_tokens"][0], id=1000, content="<think>", special=False)
    content["added_tokens"].append(added)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    texts = ["a <think> b", "a <thin", "<think><think>\n"]
    ids = [Words.of(tmp_path).encode(text) for text in texts]
    assert ids == library(tmp_path, texts)
    assert 1000 in ids[0]


def test_tokenizers_with_other_rules_are_not_taken(folder, tmp_path):
    train_sentencepiece([CODE], 500, tmp_path / "pieces")
    assert Words.of(tmp_path / "pieces") is None
    for number, change in enumerate((("pre_tokenizer", None), ("normalizer", {"type": "NFC"}))):
        copy_folder(folder, tmp_path / str(number))
        path = tmp_path / str(number) / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(content | dict([change])), encoding="utf-8")
        assert Words.of(tmp_path / str(number)) is None

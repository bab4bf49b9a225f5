"""Evaluation sets are found wherever they are in a text, and cut out of it."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from data.clean import Decontaminate
from data.clean.decontaminate import WORD, _index, _ngram_hashes, _word_hashes
from data.documents import Document, Rejected
from data.errors import DataError
from tests.data.clean.texts import made_up, prose

CHINESE = "一辆汽车以每小时六十公里的速度行驶了三个小时，请问它一共走了多少公里？"


@pytest.fixture
def items(tmp_path: Path) -> Path:
    """100 questions of 8 to 60 words."""
    rng = random.Random(0)
    questions = [" ".join(rng.choices(made_up(3000), k=rng.randint(8, 60))) for _ in range(100)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"id": i, "question": text}) + "\n" for i, text in enumerate(questions)))
    return path


def disguised(words: list[str], rng: random.Random) -> str:
    """The same words with another case, spacing and punctuation."""
    marks = [" ", "  ", "\n", ", ", " - ", "! ", " “", "” ", "…", "\t", "_", "'"]
    return "".join(rng.choice([word, word.upper(), word.title()]) + rng.choice(marks) for word in words)


def test_every_ngram_is_found_wherever_it_is_and_however_it_is_written(items: Path) -> None:
    rng = random.Random(1)
    step = Decontaminate(evaluation=[str(items)], action="reject").build()
    texts = [text[:1000] for text in prose()]
    planted = 0
    for line in items.read_text().splitlines():
        words = json.loads(line)["question"].split()
        for first in range(max(1, len(words) - 12)):  # each 13-gram, or all of a shorter item
            host = rng.choice(texts)
            at = rng.randrange(len(host))
            text = host[:at] + " " + disguised(words[first : first + 13], rng) + " " + host[at:]
            assert step.apply(Document(text, "here")) == Rejected("contaminated")
            planted += 1
    assert planted > 2000
    clean = [Document(text, "here") for text in texts]
    assert [step.apply(document) for document in clean] == clean


def test_fewer_words_are_no_match(items: Path) -> None:
    step = Decontaminate(evaluation=[str(items)], action="reject").build()
    for line in items.read_text().splitlines():
        words = json.loads(line)["question"].split()
        document = Document("Here it says " + " ".join(words[: min(len(words) - 1, 12)]) + " and ends.", "here")
        assert step.apply(document) is document


def test_chinese_is_matched_character_by_character(tmp_path: Path) -> None:
    path = tmp_path / "zh.txt"
    path.write_text(CHINESE)
    step = Decontaminate(evaluation=[str(path)], action="reject").build()
    around = "我们今天学习数学。"
    assert step.apply(Document(around + CHINESE[3:16] + around, "here")) == Rejected("contaminated")  # 13 characters
    assert step.apply(Document(around + "，".join(CHINESE[3:16]) + around, "here")) == Rejected("contaminated")
    assert isinstance(step.apply(Document(around + CHINESE[3:15] + around, "here")), Document)  # 12 characters


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("don't well-known snake_case 3.14", ["don", "t", "well", "known", "snake", "case", "3", "14"]),
        ("中文ABC混合", ["中", "文", "ABC", "混", "合"]),
        ("cafe\u0301 über", ["cafe\u0301", "über"]),
        ("ひらがな カタカナ 한국어", [*"ひらがなカタカナ", "한국어"]),
    ],
)  # fmt: skip
def test_words_are_runs_of_letters_and_digits_or_one_chinese_character(written: str, words: list[str]) -> None:
    assert WORD.findall(written) == words


def test_accents_case_and_width_tell_no_words_apart() -> None:
    assert _word_hashes("CAFE\u0301 Straße １２").tolist() == _word_hashes("café STRASSE 12").tolist()


def test_a_match_is_cut_out_with_its_margin(tmp_path: Path) -> None:
    # Words of six letters, each with a space after it: word i lies at [7i, 7i + 6). The match is words 100 … 112, characters
    # [700, 790). A margin of 20 widens it to [680, 810): words 97 … 115 go, words 96 [672, 678) and 116 [812, 818) stay.
    words = made_up(300)
    path = tmp_path / "evaluation.txt"
    path.write_text(" ".join(words[100:113]))
    step = Decontaminate(evaluation=[str(path)], margin=20).build()
    result = step.apply(Document(" ".join(words), "here"))
    assert isinstance(result, Document)
    assert result.text == " ".join(words[:97]) + "\n\n" + " ".join(words[116:])


def test_what_is_left_is_the_text_around_the_match(items: Path) -> None:
    rng = random.Random(2)
    step = Decontaminate(evaluation=[str(items)], margin=0, min_piece=0).build()
    texts = prose()
    for line in items.read_text().splitlines():
        host = rng.choice(texts)
        at = rng.randrange(len(host) // 4, len(host) // 2)
        planted = disguised(json.loads(line)["question"].split(), rng)
        result = step.apply(Document(host[:at] + " " + planted + " " + host[at:], "here"))
        assert isinstance(result, Document)
        last, first = list(WORD.finditer(host[:at]))[-1], WORD.search(host[at:])
        assert first is not None
        assert result.text == host[: last.end()].strip() + "\n\n" + host[at + first.start() :].strip()


def test_short_pieces_go_and_a_document_in_many_pieces_falls(tmp_path: Path) -> None:
    words = made_up(1000)
    path = tmp_path / "evaluation.txt"
    path.write_text(
        "\n\n".join(" ".join(words[at : at + 13]) for at in range(0, 1000, 100))
    )  # ten matches: ten pieces of 609
    document = Document(" ".join(words), "here")
    settings = {"evaluation": [str(path)], "margin": 0}
    whole = Decontaminate(**settings, max_pieces=10).build().apply(document)
    assert isinstance(whole, Document)
    assert whole.text == "\n\n".join(
        " ".join(words[at + 13 : at + 100]) for at in range(0, 1000, 100)
    )  # 87·7 − 1 = 608 characters
    assert Decontaminate(**settings, max_pieces=9).build().apply(document) == Rejected("contaminated")
    assert Decontaminate(**settings, min_piece=608).build().apply(document) == whole
    assert Decontaminate(**settings, min_piece=609).build().apply(document) == Rejected("contaminated")


def test_matches_side_by_side_are_one(tmp_path: Path) -> None:
    words = made_up(200)
    path = tmp_path / "evaluation.txt"
    path.write_text(" ".join(words[50:150]))
    step = Decontaminate(evaluation=[str(path)], margin=0, min_piece=0).build()
    result = step.apply(Document("«" + " ".join(words) + ".»", "here"))
    assert isinstance(result, Document)
    assert result.text == "«" + " ".join(words[:50]) + "\n\n" + " ".join(words[150:]) + ".»"


def test_evaluation_sets_come_as_json_lines_parquet_and_text(tmp_path: Path) -> None:
    words = [made_up(13, 13 * i) for i in range(6)]
    texts = [" ".join(group) for group in words]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"q": texts[0], "choices": [{"text": texts[1]}, "no"], "answer": 3}) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"q": [texts[2]], "n": [1]}), tmp_path / "b.parquet")
    (tmp_path / "d.json").write_text(json.dumps([{"q": texts[5]}], indent=1))
    (tmp_path / "c.txt").write_text(texts[3].replace(" ", "\n") + "\n \n" + texts[4])
    step = Decontaminate(evaluation=[str(tmp_path / "*.*")], action="reject").build()
    assert [step.apply(Document(text, "here")) for text in texts] == [Rejected("contaminated")] * 6
    across = Document(" ".join(words[3][6:] + words[4][:6]), "here")  # an empty line parts them
    assert step.apply(across) is across


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": 1\n', r"a\.jsonl: line 1: no JSON \(.*\); mend the file, or fetch it again"),
        ("a.txt", b"\xff\xfe", r"a\.txt: not UTF-8"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", r"a\.jsonl\.gz: damaged after line 0"),
        ("a.parquet", b"PAR", r"a\.parquet: no Parquet"),
        ("a.txt", b"too few words", r"a\.txt: has no text of 8 words \(min_ngram\); lower min_ngram, or leave the file out"),
    ],
)  # fmt: skip
def test_what_is_no_evaluation_set_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        Decontaminate(evaluation=[str(tmp_path / name)]).build()
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_wrong_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation: 'nowhere\*\.jsonl': no such file or pattern"):
        Decontaminate(evaluation=["nowhere*.jsonl"]).build()
    with pytest.raises(ValidationError, match="min_ngram: 8: is more than ngram = 5; lower it"):
        Decontaminate(evaluation=["x"], ngram=5)


def test_the_index_holds_each_ngram_once_in_eight_bytes(items: Path) -> None:
    index = _index(Decontaminate(evaluation=[str(items), str(items)]))
    counts = [len(json.loads(line)["question"].split()) for line in items.read_text().splitlines()]
    assert {n: len(hashes) for n, hashes in index.items()} == {
        **{n: counts.count(n) for n in range(8, 13)},
        13: sum(count - 12 for count in counts if count >= 13),
    }
    assert all(hashes.itemsize == 8 and bool(np.all(np.diff(hashes) > 0)) for hashes in index.values())


def test_the_hash_of_an_ngram_is_its_formula() -> None:
    words = np.array([3, 5, 7], np.uint64)
    radix = 0x9E3779B97F4A7C15
    assert _ngram_hashes(words, 2).tolist() == [(3 * radix + 5) % 2**64, (5 * radix + 7) % 2**64]
    assert _ngram_hashes(words, 4).tolist() == []

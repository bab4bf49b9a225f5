"""The n-gram yardstick against its formula, written out literally over dictionaries."""

import json
import math
import subprocess
from collections import Counter

import numpy as np
import pytest

from benchmarks.ngram import NGram, Stream
from tests.benchmarks.commands import command

V, EOS = 7, 0


def literal(documents, order, kneser_ney):
    """P(w | context) of the docstring's formula, for one context and token at a time."""
    padded = [[EOS] * (order - 1) + [int(t) for t in ids] + [EOS] for ids in documents]
    grams = {
        n: Counter(tuple(ids[i - n + 1 : i + 1]) for ids in padded for i in range(order - 1, len(ids)))
        for n in range(1, order + 1)
    }
    for n in range(1, order) if kneser_ney else ():
        grams[n] = Counter(gram[1:] for gram in grams[n + 1])

    def probability(context, token, n=order):
        if n == 0:
            return 1 / V
        counts = grams[n]
        once, twice = (sum(c == times for c in counts.values()) for times in (1, 2))
        discount = once / (once + 2 * twice) if once and twice else 0.5
        history = tuple(context[len(context) - n + 1 :])
        lower = probability(context, token, n - 1)
        after = {gram[-1]: c for gram, c in counts.items() if gram[:-1] == history}
        total = sum(after.values())
        if not total:
            return lower
        return (max(after.get(token, 0) - discount, 0) + discount * len(after) * lower) / total

    return probability


@pytest.fixture(scope="module")
def documents():
    """Twelve documents of skewed tokens 1 … 5: token 6 is never seen."""
    generator = np.random.default_rng(0)
    return [generator.choice(5, size=size, p=[0.5, 0.2, 0.15, 0.1, 0.05]) + 1 for size in generator.integers(1, 12, 12)]


@pytest.mark.parametrize("kneser_ney", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_every_probability_is_the_formulas_and_each_context_sums_to_one(documents, order, kneser_ney):
    model = NGram.fit(Stream.of(documents, order, EOS), order, V, kneser_ney)
    expected = literal(documents, order, kneser_ney)
    contexts = [(1, 1, 1), (2, 1, 3), (EOS, EOS, 1), (EOS, EOS, EOS), (5, 5, 5), (6, 6, 1), (1, 2, 6)]
    for context in contexts:
        tokens = np.array([[*context, w] for w in range(V)]).flatten()
        last = np.tile(np.arange(4) == 3, V)
        found = model.probabilities(Stream(tokens, last))
        assert found == pytest.approx([expected(context, w) for w in range(V)], rel=1e-12)
        assert found.sum() == pytest.approx(1.0, rel=1e-12)


def test_a_stream_predicts_every_token_and_the_end_of_each_document():
    stream = Stream.of([np.array([3, 4]), np.array([], np.int64)], 3, EOS)
    assert stream.tokens.tolist() == [0, 0, 3, 4, 0, 0, 0, 0]
    assert stream.predicted.tolist() == [False, False, True, True, True, False, False, True]


def test_the_program_reports_bits_per_byte_by_language_and_source(tmp_path):
    lines = ["the cat sat on the mat\n" * 9, "静夜思 床前明月光\n" * 9]
    for name in ("train", "validation"):
        records = [
            {"text": text, "lang": lang, "source": f"{lang}-{name}"}
            for text, lang in zip(lines, ("en", "zh"), strict=True)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")
    files = {"--train": "train.jsonl", "--validation": "validation.jsonl", "--json": "out.json"}
    values = {option: str(tmp_path / name) for option, name in files.items()}
    subprocess.run(command("ngram.py", values | {"--vocab-size": "280"}), check=True, capture_output=True)
    result = json.loads((tmp_path / "out.json").read_text())["validation"]
    assert result["lang"].keys() == {"en", "zh"}
    assert result["source"].keys() == {"en-validation", "zh-validation"}
    bits = sum(row["bits_per_byte"] * row["bytes"] for row in result["lang"].values())
    size = sum(len(text.encode()) for text in lines)
    assert result["all"]["all"]["bytes"] == size
    assert result["all"]["all"]["bits_per_byte"] == pytest.approx(bits / size)
    assert 0 < result["all"]["all"]["bits_per_byte"] < math.log2(256)

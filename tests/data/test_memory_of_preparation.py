"""A preparation holds a shard, however much text there is."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

MB = 1_000_000
ALLOWED = 64 * MB  # beside the libraries and their models
WORDS = [
    f"{start}{end}"
    for start in ("wha", "shi", "ti", "lan", "sto", "gre")
    for end in ("le", "p", "de", "tern", "rm", "y")
]
ROOT = Path(__file__).parents[2]


def write_text(path: Path, size: int, seed: int) -> None:
    """Lines of about 4 kB, all of them different."""
    pick = random.Random(seed)
    sentences = [" ".join(pick.choices(WORDS, k=12)) + "." for _ in range(5000)]
    with path.open("w") as file:
        while file.tell() < size:
            file.write(json.dumps({"text": "\n".join(pick.choices(sentences, k=60))}) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_times_the_memory_allowed_is_prepared_within_it(tmp_path):
    """Without the rules of words and MinHash, which are slow and hold no more than one document."""
    arguments = []
    for name, size in (("large", 10 * ALLOWED), ("small", 8 * MB)):
        write_text(tmp_path / f"{name}.jsonl", size, seed=len(name))
        recipe = {
            "sources": [{"name": "web", "kind": "jsonl", "path": str(tmp_path / f"{name}.jsonl")}],
            "steps": [{"kind": "normalise"}, {"kind": "pii"}],
            "tokenizer": {"vocab_size": 340, "sample_bytes": MB},
            "fim_rate": 0.1,
            "split_joined_rate": 0.1,
            "shard_bytes": 4 * MB,
            "tokens_per_file": 20 * MB,
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        arguments += [str(tmp_path / f"{name}.yaml"), str(tmp_path / name)]
    command = [sys.executable, "-m", "tests.data.memory_of_preparation", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["documents"] > 100_000
    assert found["growth"] < ALLOWED, f"{found['growth'] / MB:.0f} MB"

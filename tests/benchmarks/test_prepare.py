"""The comparison of preparations runs, and all write the same tokens."""

import json
import subprocess

import pytest

from data.tokenizer import train_bpe
from tests.benchmarks.commands import command


@pytest.mark.slow
def test_the_program_holds_three_others_against_ours(tmp_path):
    texts = [f"Call me Ishmael number {number}.\n\nint main() {{ return {number}; }}\n" * 20 for number in range(400)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {"--text": str(tmp_path / "text.jsonl"), "--json": str(tmp_path / "out.json"), "--megabytes": "0.5"}
    folder = tmp_path / "tokenizer"
    train_bpe(texts, 300, folder)
    more = ("--rounds", "1", "--workers", "1", "--tokenizer", str(folder))
    subprocess.run(command("prepare.py", values, *more), check=True, capture_output=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["workers_1"].keys() == {"rorqual", "datatrove", "datatrove_shuffled", "megatron"}
    for each in result["workers_1"].values():
        assert each["tokens_per_second_and_core"] > 0 and each["peak_bytes"] > 2**20
        assert each["ratio"]["smallest"] <= each["ratio"]["median"] <= each["ratio"]["largest"]

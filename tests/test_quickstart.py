"""The first command of the README does the main job, from text to a checkpoint that transformers has read."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow  # about six minutes on two cores
@pytest.mark.timeout(1800)
def test_quickstart_trains_and_exports(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "quickstart.sh"], env=os.environ | {"WORK": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "KING HENRY:" in done.stdout
    assert (tmp_path / "exports/tiny/model.safetensors").is_file()
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    validations = [line["validation"] for line in lines if "validation" in line]
    for source, last in validations[-1].items():
        assert last["bits_per_byte"] < 0.9 * validations[0][source]["bits_per_byte"], source

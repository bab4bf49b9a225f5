"""The benchmark of checkpoints runs as benchmarks/README.md says."""

import json
from pathlib import Path

from tests.benchmarks.commands import command, run


def test_checkpoints_are_timed_against_torch_s_own(tmp_path: Path) -> None:
    run(
        command("checkpoint.py", {"--json": str(tmp_path / "checkpoint.json")}, "--megabytes", "2", "--turns", "1"),
        tmp_path,
    )
    result = json.loads((tmp_path / "checkpoint.json").read_text())
    assert set(result["ours_over_theirs"]) == {"save", "load", "verify and load", "bytes"}
    assert 0.9 < result["ours_over_theirs"]["bytes"] < 1.1

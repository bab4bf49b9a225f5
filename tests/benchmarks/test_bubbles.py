"""`bubbles.py` counts and draws all schedules."""

import json

import pytest

from tests.benchmarks.commands import command, run


def test_the_schedules_stand_beside_each_other(tmp_path):
    values = {"--ranks": "2", "--micro-batches": "4", "--out": str(tmp_path / "bubbles.png")}
    run(command("bubbles.py", values, "--overlapped", "2.5", "--json", str(tmp_path / "bubbles.json")))
    found = json.loads((tmp_path / "bubbles.json").read_text())
    assert {row["schedule"]: (row["bubble"], row["formula"]) for row in found} == {
        "1f1b": (3, 3),
        "interleaved": (1.5, 1.5),
        "zbv": (0.5, 0),
        "dualpipev": (0.75, 0.75),  # half of 2.5 + 1 - 2
    }
    assert found[-1]["of_the_step"] == pytest.approx(
        0.75 / (4 * 3 - 3 * 0.5 / 2 + 0.75)
    )  # three pairs overlap on a rank
    assert (tmp_path / "bubbles.png").stat().st_size > 10_000

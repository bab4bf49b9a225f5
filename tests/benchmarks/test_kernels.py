"""The program that measures kernels runs on a CPU and a shape of a few thousand parameters, and every kernel is right."""

import json
import sys

import pytest

from tests.benchmarks.commands import ROOT, command
from tests.benchmarks.test_train_step import MICRO


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What the README's command writes for the micro shape, run in this process."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "micro.json").write_text(json.dumps(MICRO))
    values = {"--shape": str(folder / "micro.json"), "--json": str(folder / "out.json")}
    words = command("kernels.py", values, "--device", "cpu", "--rounds", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setattr(sys, "argv", words[1:])
        import kernels

        patch.setitem(kernels.PARAMETERS, "cpu", 1 << 12)
        kernels.main()
    return json.loads((folder / "out.json").read_text())


def test_every_kernel_is_measured_beside_its_twin(result):
    by: dict[str, set[str]] = {}
    for row in result["kernels"]:
        assert "failed" not in row
        by.setdefault(row["kernel"], set()).add(row["by"])
    assert by.keys() == {
        "RMSNorm", "attention", "gate", "sort by expert", "gather", "combine", "swiglu", "experts", "head and loss", "AdamW",
    }  # fmt: skip
    assert by["attention"] >= {"fused", "sdpa", "reference"}
    assert all("ours" in names and len(names) > 1 for kernel, names in by.items() if kernel != "attention")


def test_outputs_and_gradients_are_those_of_float64(result):
    assert all(row["error"] < 1e-4 for row in result["kernels"])


def test_rates_are_held_against_what_bounds_them(result):
    for row in result["kernels"]:
        low, high = row["spread"]
        assert 0 < low <= row["seconds"] <= high
        products = row["kernel"] in ("attention", "experts", "head and loss")
        assert row["unit"] == ("FLOP/s" if products else "B/s")
        bound = result["peak_flops" if products else "copy_bytes_per_second"]
        assert row["share"] == pytest.approx(row["rate"] / bound)
    experts = next(row for row in result["kernels"] if row["kernel"] == "experts")
    assert experts["rate"] * experts["seconds"] == pytest.approx(
        6 * 32 * 2 * 3 * 16 * 8
    )  # 32 tokens, top 2, [16 × 8] thrice

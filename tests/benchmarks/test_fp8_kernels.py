"""The program that measures the kernels of FP8 runs on a CPU, where errors are what the format makes them."""

import json
import sys

import pytest

from tests.benchmarks.commands import ROOT, command

BENCHMARKS = str(ROOT / "benchmarks")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What the README's command writes for the small shapes, run in this process."""
    out = tmp_path_factory.mktemp("fp8_kernels") / "out.json"
    words = command("fp8_kernels.py", {"--shapes": "small", "--json": str(out)}, "--device", "cpu", "--rounds", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setattr(sys, "argv", words[1:])
        import fp8_kernels

        fp8_kernels.main()
    return json.loads(out.read_text())


def test_every_kernel_is_measured(result):
    named = {row["kernel"] for row in result["kernels"]}
    assert named == {
        "rows", "columns", "rows and columns", "columns of rows, grouped", "blocks", "blocks, transposed", "swiglu",
        "swiglu backward, grouped", "rows × blocks", "columns × columns", "grouped rows × blocks", "grouped columns × columns",
    }  # fmt: skip
    assert not any("failed" in row for row in result["kernels"])


def test_quantising_costs_what_three_bits_of_mantissa_do_and_products_nothing(result):
    """E4M3 is off by 2⁻⁴/√3 · √(3/(8 ln 2)) = 0.0265 of a number; a product by both factors', √2 as much."""
    for row in result["kernels"]:
        if row["by"] == "plain":
            assert row["error_in_all"] < 1e-6 and "error" not in row
        elif "×" in row["kernel"]:
            assert row["error"] < 1e-6 and 0.03 < row["error_in_all"] < 0.045
        elif row["kernel"] == "columns of rows, grouped":  # powers of two
            assert row["error"] < 1e-3
        else:
            assert 0.02 < row["error"] < 0.03


def test_rates_are_those_of_the_figures_beside_them(result):
    for row in result["kernels"]:
        low, high = row["spread"]
        assert 0 < low <= row["seconds"] <= high
        by_flops = row["unit"] == "FLOP/s"
        work = row["bytes"]
        if by_flops:
            m, n, k = map(int, row["size"].split("×"))
            work = 2 * m * n * k
        assert row["rate"] == pytest.approx(work / row["seconds"])
        bound = result["peak_flops" if by_flops else "copy_bytes_per_second"]
        assert row["share"] == pytest.approx(row["rate"] / bound)

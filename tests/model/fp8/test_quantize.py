"""Quantisation against float64, against a second E4M3 in numpy, and against what the format predicts."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from model.ops.fp8.quantize import (
    E4M3,
    TILE,
    Quantized,
    dequantize,
    padded_rows,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    requantize_columns,
    transpose_blocks,
)
from tests.model.fp8.numbers import BIAS, ERROR, POSITIVE, exact, norm_error, rows_of, steps, value_of

COUNTS = (0, 130, 128, 0, 1, 57, 0)  # rows of seven groups: none, a tile and a bit, a tile, one, a part


def spread(*shape: int, octaves: float = 30, seed: int = 0) -> Tensor:
    """Gaussian numbers, each times its own power of two: in every tile there are subnormals, and numbers that vanish."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp2(-octaves * torch.rand(shape, generator=generator))


def scale_free(*shape: int) -> Tensor:
    """Gaussian numbers, whose rows have magnitudes spread evenly over an octave: mantissas are then spread as 1/m."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator) * torch.exp2(torch.rand(shape[0], 1, generator=generator))


def scales(x: Quantized) -> Tensor:
    """The scale of every number, float64."""
    return exact(Quantized(torch.ones_like(x.data.float()), x.scale))


def test_the_numbers_are_those_of_the_format() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor([value_of(code) for code in range(256)], dtype=torch.float64)
    one = torch.ones(256, 1)
    torch.testing.assert_close(codes.view(E4M3).double(), expected, rtol=0, atol=0, equal_nan=True)
    found = dequantize(Quantized(codes.view(E4M3).unsqueeze(1), one))
    torch.testing.assert_close(found[:, 0].double(), expected, rtol=0, atol=0, equal_nan=True)
    assert POSITIVE[-1] == 448 and POSITIVE[1] == 2**-9


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("width", [1, 128, 200])
def test_rows_are_those_of_a_search_over_all_numbers(width: int, power_of_two: bool) -> None:
    x = spread(40, width, octaves=20)
    found = quantize_rows(x, power_of_two)
    values, scale = rows_of(x.numpy(), power_of_two)
    assert np.array_equal(found.scale.numpy(), scale)
    assert np.array_equal(found.data.float().numpy(), values)


def test_ties_go_to_the_even_mantissa() -> None:
    """With 448 in the tile the scale is 1; midway between 16 and 18 is 17 (→ 16), between 18 and 20 is 19 (→ 20)."""
    x = torch.tensor([[448.0, 17, 19, 21, -17, -19, 2**-10, 3 * 2**-10]])
    expected = [448, 16, 20, 20, -16, -20, 0, 2**-8]
    assert quantize_rows(x).data.float().tolist() == [expected]


@pytest.mark.parametrize("power_of_two", [False, True])
def test_columns_are_rows_of_each_groups_transpose(power_of_two: bool) -> None:
    """Group by group; what lies between and behind them is zero, and P is known from M and E alone."""
    x = spread(sum(COUNTS), 96, octaves=20)
    found = quantize_columns(x, torch.tensor(COUNTS), power_of_two)
    assert found.data.shape == (96, padded_rows(len(x), len(COUNTS))) == (96, (316 // 128 + 7) * 128)
    assert found.scale.shape == (96, found.data.shape[1] // TILE)
    filled, start = torch.zeros(found.data.shape[1], dtype=torch.bool), 0
    for group in x.split(COUNTS):
        end = start + len(group)
        filled[start:end] = True
        values, scale = rows_of(group.T.contiguous().numpy(), power_of_two)
        assert np.array_equal(found.data[:, start:end].float().numpy(), values)
        assert np.array_equal(found.scale[:, start // TILE : -(-end // TILE)].numpy(), scale)
        start = -(-end // TILE) * TILE
    assert (found.data[:, ~filled].float() == 0).all() and filled.sum() == len(x)


def test_columns_of_one_group_are_the_transpose() -> None:
    x = spread(200, 130)
    found, expected = quantize_columns(x), quantize_rows(torch.nn.functional.pad(x, (0, 0, 0, 56)).T.contiguous())
    assert torch.equal(found.data.float(), expected.data.float()) and torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("kind", ["rows", "rows of powers of two", "columns", "blocks"])
def test_no_error_is_above_half_a_step(kind: str) -> None:
    """Of normal and of subnormal numbers, 2⁻⁶ of the scale being the border; x / scale has a rounding of its own, fp32's."""
    x = spread(300, 200)
    found = {
        "rows": lambda: quantize_rows(x),
        "rows of powers of two": lambda: quantize_rows(x, power_of_two=True),
        "columns": lambda: quantize_columns(x),
        "blocks": lambda: quantize_blocks(x),
    }[kind]()
    original = torch.nn.functional.pad(x, (0, 0, 0, 84)).T if kind == "columns" else x
    error = (exact(found) - original.double()).abs()
    half = steps(original, scales(found)) / 2
    assert (error <= half * (1 + 2**-18)).all()
    subnormal = original.double().abs() < 2**-6 * scales(found)
    for part in (subnormal, ~subnormal):
        assert part.sum() > 1000 and (error / half)[part].max() > 0.98, "the bound is reached"
    assert (error[~subnormal] <= original.double().abs()[~subnormal] / 16 * (1 + 2**-18)).all()


def test_the_error_of_scale_free_numbers_is_that_of_three_mantissa_bits() -> None:
    """2.65 %, of a number and of the norm, both within 1 %, which 400,000 numbers allow. Subnormals are left out."""
    x = scale_free(3000, TILE)
    found = quantize_rows(x, power_of_two=True)
    normal = x.abs() >= 2**-6 * found.scale
    error = exact(found) - x.double()
    assert normal.double().mean() > 0.99
    relative = (error / x)[normal]
    assert float(relative.square().mean().sqrt()) == pytest.approx(ERROR, rel=0.01)
    assert norm_error(exact(found), x.double()) == pytest.approx(ERROR, rel=0.01)
    assert float(relative.mean()) == pytest.approx(BIAS, abs=2e-4)


@pytest.mark.parametrize("kind", ["rows", "columns", "blocks"])
def test_the_error_of_gaussian_numbers_is_uniform_within_a_step(kind: str) -> None:
    """A step's variance is step²/12; the largest number of a tile has none, since it becomes 448."""
    x = scale_free(640, 640).T.contiguous()
    found = {"rows": quantize_rows, "columns": quantize_columns, "blocks": quantize_blocks}[kind](x)
    original = x.T if kind == "columns" else x
    inexact = found.data.float().abs() < 448
    error, step = (exact(found) - original.double())[inexact], steps(original, scales(found))[inexact]
    assert float((error / step).square().mean()) == pytest.approx(1 / 12, rel=0.01)
    assert abs(float((error / step).mean())) < 4 / math.sqrt(12 * error.numel())
    assert norm_error(exact(found)[inexact], original.double()[inexact]) == pytest.approx(ERROR, rel=0.03)


@pytest.mark.parametrize("octaves", [0, 60])
def test_a_scale_is_the_largest_number_over_448_and_a_power_of_two_less_than_twice_that(octaves: float) -> None:
    x = spread(50, 300, octaves=0) * torch.exp2(octaves * (torch.arange(50) / 50 - 0.5)).unsqueeze(1)
    tiles = torch.nn.functional.pad(x, (0, 84)).unflatten(1, (3, TILE)).double()
    largest = tiles.abs().amax(-1)
    plain, power = quantize_rows(x), quantize_rows(x, power_of_two=True)
    torch.testing.assert_close(plain.scale.double(), largest / 448, rtol=2**-24, atol=0)
    assert (torch.frexp(power.scale)[0] == 0.5).all(), "a power of two"
    ratio = power.scale.double() / (largest / 448)
    assert (ratio > 1 - 2**-23).all() and (ratio < 2).all()
    reached = torch.nn.functional.pad(plain.data.float(), (0, 84)).unflatten(1, (3, TILE)).abs().amax(-1)
    assert (reached == 448).all()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("kind", ["rows", "columns", "blocks"])
def test_what_is_no_ordinary_number_stays_in_its_tile(kind: str, power_of_two: bool) -> None:
    """Zeros and numbers of 1e-38 become zeros of a normal scale; infinity and NaN make a scale that says so, and no number."""
    if kind == "blocks" and power_of_two:
        return
    x = torch.randn(TILE, 5 * TILE, generator=torch.Generator().manual_seed(0))
    tiles = x.split(TILE, 1)
    tiles[0].zero_()
    tiles[1].fill_(1e-38)
    tiles[2][:, 3] = math.inf
    tiles[3][:, 5] = math.nan
    if kind == "columns":
        found = quantize_columns(x.T.contiguous(), torch.tensor([TILE] * 5), power_of_two)
    else:
        found = quantize_blocks(x) if kind == "blocks" else quantize_rows(x, power_of_two)
    values = dequantize(found)[:, : 5 * TILE].split(TILE, 1)
    zero, tiny, infinite, nan, plain = found.scale.T[:5]
    assert (values[0] == 0).all() and (values[1] == 0).all()
    assert ((zero > 2**-126) & (zero < 1e-30) & (tiny == zero)).all()
    assert (infinite == math.inf).all() and nan.isnan().all()
    assert values[2].isnan().all() and values[3].isnan().all()
    assert plain.isfinite().all() and norm_error(values[4], tiles[4].double()) < 0.03


def test_powers_of_two_make_transposing_exact_but_for_subnormals() -> None:
    """Rows to columns. Tokens differ by up to 2¹², so that some fall under 2⁻⁶ of a column's scale. With fp32 scales nearly every
    number changes, by as much as it had already been rounded."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 256, generator=generator) * torch.exp2(12 * torch.rand(256, 1, generator=generator))
    rows = quantize_rows(x, power_of_two=True)
    columns = requantize_columns(rows)
    before, after = exact(rows).T, exact(columns)
    normal = before.abs() >= 2**-6 * scales(columns)
    assert torch.equal(before[normal], after[normal])
    assert (before != after)[~normal].double().mean() > 0.5 and (~normal).double().mean() > 0.02
    assert ((before - after).abs() <= scales(columns) * 2**-10).all()

    rows = quantize_rows(x)
    before, after = exact(rows).T, exact(quantize_columns(dequantize(rows)))
    assert (before != after)[normal].double().mean() > 0.6
    assert norm_error(after, before) == pytest.approx(ERROR, rel=0.2)


def test_quantising_by_powers_of_two_again_changes_nothing() -> None:
    """Also where the largest number was rounded to 224, and its scale becomes half of what it was."""
    once = quantize_rows(spread(400, 200, octaves=20), power_of_two=True)
    again = quantize_rows(dequantize(once), power_of_two=True)
    assert torch.equal(exact(again), exact(once))
    assert ((again.scale == once.scale) | (again.scale == once.scale / 2)).all() and (again.scale != once.scale).any()


def test_a_block_scale_is_that_of_its_square_and_transposing_is_exact() -> None:
    weight = spread(3, 300, 200)
    found = quantize_blocks(weight)
    assert found.scale.shape == (3, 3, 2)
    for e, n, k in ((0, 0, 0), (1, 2, 1), (2, 1, 0)):
        block = weight[e, n * TILE : (n + 1) * TILE, k * TILE : (k + 1) * TILE]
        assert found.scale[e, n, k] == block.abs().max() / 448
    transposed, expected = transpose_blocks(found), quantize_blocks(weight.mT.contiguous())
    assert torch.equal(transposed.scale, expected.scale)
    assert torch.equal(transposed.data.float(), expected.data.float()) and transposed.data.is_contiguous()


def test_a_matrix_is_quantised_as_each_of_a_stack_is() -> None:
    weight = spread(2, 130, 70)
    stack = quantize_blocks(weight)
    for index, matrix in enumerate(weight):
        alone = quantize_blocks(matrix)
        assert torch.equal(stack.data[index].float(), alone.data.float())
        assert torch.equal(stack.scale[index], alone.scale)

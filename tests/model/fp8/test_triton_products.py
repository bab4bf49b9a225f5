"""The matrix products in Triton are sums of scaled tiles. Interpreted on a CPU; the same tests run on a GPU.

A product of two E4M3 numbers is exact in fp32, so a kernel and `multiply_by_tiles` differ by roundings of sums in fp32 alone: each
at most 2⁻²⁴ of the sum of magnitudes, 127 within a tile and two more for each tile. Tensor cores add with about 14 bits: of signs
that alternate that is little, of positive numbers it shows.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from model.ops.fp8.kernels import multiply_by_tiles
from model.ops.fp8.products import multiply, multiply_within_groups
from model.ops.fp8.quantize import (
    TILE,
    Quantized,
    dequantize,
    padded_ends,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
)
from tests.triton import NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)

from model.ops.fp8.triton import products

COUNTS = [130, 0, 5, 128, 0, 70]


def magnitudes(a: Quantized, b: Quantized) -> Tensor:
    """Σ |a| |b|: what a rounding of the sum is relative to."""
    return dequantize(a).abs() @ dequantize(b).abs().T


def agrees(found: Tensor, expected: Tensor, a: Quantized, b: Quantized) -> bool:
    """Whether `found` is within the roundings of sums from `expected`."""
    steps = TILE + 2 * a.scale.shape[1]
    rounding = steps * 2**-24 if found.device.type == "cpu" else 2**-11
    return bool(((found - expected).abs() <= rounding * magnitudes(a, b)).all())


def random(*shape: int, device: torch.device) -> Tensor:
    """Normal, each row of another size, so that a wrong scale is a wrong number."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * torch.randn((*shape[:-1], 1), generator=generator).exp()
    x[..., ::7] *= 3 * torch.arange(1, x[..., ::7].shape[-1] + 1)  # and so each tile
    return x.to(device)


def rows_of(x: Quantized, begin: int, end: int) -> Quantized:
    return Quantized(x.data[begin:end], x.scale[begin:end])


def tiles_of(x: Quantized, begin: int, end: int) -> Quantized:
    """Columns from tile to tile."""
    return Quantized(x.data[:, begin * TILE : end * TILE], x.scale[:, begin:end])


@pytest.mark.parametrize(("m", "n", "k"), [(200, 144, 304), (1, 130, 128), (130, 1, 41), (1200, 257, 40)])
def test_rows_times_blocks_is_the_sum_of_scaled_tiles(m: int, n: int, k: int, device: torch.device) -> None:
    a, b = quantize_rows(random(m, k, device=device)), quantize_blocks(random(n, k, device=device))
    found = products.multiply(a, b, torch.float32)
    assert agrees(found, multiply_by_tiles(a, b), a, b)
    assert torch.equal(products.multiply(a, b, torch.bfloat16), found.bfloat16())


@pytest.mark.parametrize(("m", "n", "k"), [(300, 144, 136), (1, 1, 130)])
def test_columns_times_columns_is_the_sum_of_scaled_tiles(m: int, n: int, k: int, device: torch.device) -> None:
    a, b = (quantize_columns(random(m, width, device=device)) for width in (n, k))
    assert agrees(products.multiply(a, b, torch.float32), multiply_by_tiles(a, b), a, b)


def test_a_long_sum_is_promoted_and_not_left_to_14_bits(device: torch.device) -> None:
    """Of 4,096 positive products; simulated, tensor cores err by 2⁻¹⁰˙⁶ where each tile is promoted and by 2⁻⁴ where none is."""
    numbers = [torch.rand(16, 4096, generator=torch.Generator().manual_seed(i)).to(device) for i in range(2)]
    a, b = quantize_rows(numbers[0]), quantize_blocks(numbers[1])
    of_a, of_b = quantize_columns(numbers[0].T), quantize_columns(numbers[1].T)
    for factors in ((a, b), (of_a, of_b)):
        found, expected = products.multiply(*factors, torch.float32), multiply_by_tiles(*factors)
        bound = (TILE + 2 * 32) * 2**-24 if device.type == "cpu" else 2**-8
        assert ((found - expected).abs() <= bound * expected).all()


def test_without_rows_products_are_empty_or_zero(device: torch.device) -> None:
    blocks = quantize_blocks(random(2, 64, 48, device=device))
    rows, counts = quantize_rows(random(0, 48, device=device)), torch.zeros(2, dtype=torch.int64, device=device)
    one = Quantized(blocks.data[0], blocks.scale[0])
    assert products.multiply(rows, one, torch.bfloat16).shape == (0, 64)
    assert products.multiply_groups(rows, blocks, counts, torch.bfloat16).shape == (0, 64)
    columns = quantize_columns(random(0, 48, device=device))
    assert products.multiply(columns, columns, torch.bfloat16).equal(torch.zeros(48, 48, device=device).bfloat16())
    columns = quantize_columns(random(0, 48, device=device), counts)
    within = products.multiply_within_groups(columns, columns, counts, torch.float32)
    assert within.equal(torch.zeros(2, 48, 48, device=device))


@pytest.mark.parametrize("n", [144, 256])
def test_each_group_of_rows_meets_its_own_matrix(n: int, device: torch.device) -> None:
    counts = torch.tensor(COUNTS, device=device)
    a = quantize_rows(random(sum(COUNTS), 176, device=device))
    b = quantize_blocks(random(len(COUNTS), n, 176, device=device))
    found = products.multiply_groups(a, b, counts, torch.float32)
    begin = 0
    for group, count in enumerate(COUNTS):
        rows, matrix = rows_of(a, begin, begin + count), Quantized(b.data[group], b.scale[group])
        assert agrees(found[begin : begin + count], multiply_by_tiles(rows, matrix), rows, matrix)
        begin += count


def test_each_group_of_columns_is_summed_alone(device: torch.device) -> None:
    counts = torch.tensor(COUNTS, device=device)
    a, b = (quantize_columns(random(sum(COUNTS), width, device=device), counts) for width in (130, 272))
    found = products.multiply_within_groups(a, b, counts, torch.float32)
    begin = 0
    for group, end in enumerate((padded_ends(counts) // TILE).tolist()):
        of_a, of_b = tiles_of(a, begin, end), tiles_of(b, begin, end)
        assert agrees(found[group], multiply_by_tiles(of_a, of_b), of_a, of_b)
        assert COUNTS[group] or not found[group].any()
        begin = end


def test_what_is_not_finite_stays_in_its_row_and_group(device: torch.device) -> None:
    x = random(sum(COUNTS), 160, device=device)
    x[131] = float("nan")  # of the group of 5
    counts, blocks = torch.tensor(COUNTS, device=device), quantize_blocks(random(6, 64, 160, device=device))
    found = products.multiply_groups(quantize_rows(x), blocks, counts, torch.float32)
    assert found[131].isnan().all() and found.isnan().sum() == 64
    columns = quantize_columns(x, counts)
    found = products.multiply_within_groups(columns, columns, counts, torch.float32)
    assert found[2].isnan().all() and found.isnan().sum() == 160 * 160


@pytest.fixture
def low_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 64 rows, which autotuning may choose."""
    monkeypatch.setattr(products, "_PLAIN", [c for c in products._PLAIN if c.kwargs["BLOCK_M"] == 64])
    products._autotuned.cache_clear()
    yield
    products._autotuned.cache_clear()


@pytest.mark.usefixtures("low_tiles")
def test_low_tiles_make_the_same_products(device: torch.device) -> None:
    counts = torch.tensor([70, 0, 64], device=device)
    a, b = quantize_rows(random(134, 176, device=device)), quantize_blocks(random(3, 48, 176, device=device))
    found = products.multiply_groups(a, b, counts, torch.float32)
    for group, begin, end in ((0, 0, 70), (2, 70, 134)):
        rows, matrix = rows_of(a, begin, end), Quantized(b.data[group], b.scale[group])
        assert agrees(found[begin:end], multiply_by_tiles(rows, matrix), rows, matrix)
    one = Quantized(b.data[0], b.scale[0])
    assert agrees(products.multiply(a, one, torch.float32), multiply_by_tiles(a, one), a, one)
    a, b = (quantize_columns(random(134, width, device=device)) for width in (80, 48))
    assert agrees(products.multiply(a, b, torch.float32), multiply_by_tiles(a, b), a, b)


def test_specialized_kernels_make_the_same_products(device: torch.device) -> None:
    a, b = quantize_rows(random(150, 136, device=device)), quantize_blocks(random(80, 136, device=device))
    found = multiply(a, b, torch.float32, products.SPECIALIZED)
    assert agrees(found, multiply_by_tiles(a, b), a, b)
    counts = torch.tensor([100, 50], device=device)
    a = quantize_columns(random(150, 136, device=device), counts)
    both = [multiply_within_groups(a, a, counts, torch.float32, by) for by in (products.PLAIN, products.SPECIALIZED)]
    torch.testing.assert_close(*both)


def without_promotion(a: Quantized, b: Quantized) -> Tensor:
    """One accumulation over all tiles, scaled at the end by the first tile's scales."""
    b_scale = b.scale.repeat_interleave(TILE, 0)[: len(b.data)]
    return a.data.float() @ b.data.float().T * a.scale[:, :1] * b_scale[:, 0]


def scale_of_the_next_tile(a: Quantized, b: Quantized) -> Tensor:
    return multiply_by_tiles(Quantized(a.data, a.scale.roll(1, 1)), b)


def blocks_transposed(a: Quantized, b: Quantized) -> Tensor:
    """Scales of a square matrix of blocks, by the wrong axis."""
    return multiply_by_tiles(a, Quantized(b.data, b.scale.T.contiguous()))


def last_tile_forgotten(a: Quantized, b: Quantized) -> Tensor:
    last = (a.scale.shape[1] - 1) * TILE
    return multiply_by_tiles(*(Quantized(x.data[:, :last], x.scale[:, :-1]) for x in (a, b)))


@pytest.mark.parametrize("wrong", [without_promotion, scale_of_the_next_tile, blocks_transposed, last_tile_forgotten])
def test_the_comparison_sees_a_wrong_product(wrong: Callable[[Quantized, Quantized], Tensor]) -> None:
    cpu = torch.device("cpu")
    a, b = quantize_rows(random(64, 260, device=cpu)), quantize_blocks(random(260, 260, device=cpu))
    assert agrees(dequantize(a) @ dequantize(b).T, multiply_by_tiles(a, b), a, b)
    assert not agrees(wrong(a, b), multiply_by_tiles(a, b), a, b)


def test_the_comparison_sees_a_row_in_the_wrong_group(device: torch.device) -> None:
    a, b = quantize_rows(random(200, 144, device=device)), quantize_blocks(random(2, 48, 144, device=device))
    found = products.multiply_groups(a, b, torch.tensor([100, 100], device=device), torch.float32)
    rows, matrix = rows_of(a, 100, 101), Quantized(b.data[0], b.scale[0])  # the first of the second group
    assert not agrees(found[100:101], multiply_by_tiles(rows, matrix), rows, matrix)
